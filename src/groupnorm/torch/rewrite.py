"""Source to source: hand the activation after a norm to the norm, in the `forward` of any module.

What a rewritten forward does is what the old one did, statement by statement: only where it said `act(norm(x))`, in one
expression or in statements that follow each other, it says `norm_act(norm, act, x)` now, and `norm_act` decides at each
call whether one kernel may do both. So nothing has to be known of a block beforehand, and nothing that is done to its
norm or its activation later (hooks, another module in its place) is lost.

These are seen, for a norm `self.n`, an activation `self.a` and tensors x, v, r, s and t:

    self.a(self.n(x))                   v = self.n(x); v = self.a(v)            v = self.n(x); return self.c(self.a(v))
    self.a(self.n(x) + r)               v = self.n(x); v = v + r; v = self.a(v)
    v = self.n(x); v = v * (1 + s) + t; v = self.a(v)

and the same with `torch.nn.functional.silu` and its like for `self.a`. An activation after an `if` counts as if it
stood at the end of each branch.
"""

import ast
import copy
import inspect
import symtable
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any

__all__ = ["Unreadable", "rewrite"]

_CALL = "__groupnorm_norm_act"  # the name of `norm_act` in a rewritten function; no other function has it
_WATCHERS = {"locals", "vars", "exec", "eval"}
_Statements = list[ast.stmt]


class Unreadable(Exception):  # noqa: N818 - an answer, not an error
    """Why a forward cannot be rewritten."""


def rewrite(
    function: Any, norms: Collection[str], activations: Mapping[str, str | None], norm_act: Callable[..., Any]
) -> tuple[Any, dict[str, str]]:
    """The function with every pair that is found handed to `norm_act`, and the pairs: text of the norm -> text of the
    activation. The function itself is given back where there is none.

    norms: what counts as a norm, as it is written in the source, such as "self.norm1". activations: what counts as an
    activation, and its name; None for a module, which is looked at when it is called. Raises Unreadable for a function
    without source, or one whose source is not what runs, or which closes over variables.
    """
    if not isinstance(function, types.FunctionType):
        raise Unreadable("its forward is no Python function")
    if hasattr(function, "__wrapped__"):
        inner, found = rewrite(function.__wrapped__, norms, activations, norm_act)
        return (_wrapped_again(function, inner) if found else function), found
    definition = _definition(function)
    finder = _Finder(norms, activations, definition)
    finder.visit_body(definition)
    if not finder.found:
        return function, {}
    return _compiled(definition, function, norm_act), finder.found


def _definition(function: Any) -> ast.FunctionDef:
    """The syntax tree of what runs."""
    try:
        lines, first = inspect.getsourcelines(function)
        tree: Any = ast.parse("".join(["if True:\n"] * lines[0].startswith((" ", "\t")) + lines))
    except (OSError, TypeError, SyntaxError) as error:
        raise Unreadable("its source cannot be had") from error
    definition = tree.body[0]
    if isinstance(definition, ast.If):
        first -= 1
        definition = definition.body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise Unreadable("its forward is no function definition")
    ast.increment_lineno(tree, first - 1)  # tracebacks show the lines of the file
    definition.decorator_list = []
    arguments = definition.args
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    definition.returns = None
    nothing = ast.Constant(None, lineno=1, col_offset=0)
    arguments.defaults = [nothing] * len(arguments.defaults)  # the values are taken from the function itself
    arguments.kw_defaults = [default and nothing for default in arguments.kw_defaults]
    if set(function.__code__.co_freevars) - {"__class__"}:
        raise Unreadable("its forward closes over variables")
    for node in ast.walk(definition):
        name = str(getattr(node, "attr", None) or getattr(node, "id", None))
        if isinstance(node, ast.Global | ast.Nonlocal) or name in _WATCHERS:
            raise Unreadable("its forward lets others see its variables")
        if name.startswith("__") and not name.endswith("__"):
            raise Unreadable("its forward uses private names")
    if _essence(_compiled(definition, function, None).__code__) != _essence(function.__code__):
        raise Unreadable("its source is not what runs")
    return definition


def _essence(code: types.CodeType) -> tuple[Any, ...]:
    """What two codes have in common that were compiled from the same lines."""
    constants = [_essence(value) if isinstance(value, types.CodeType) else value for value in code.co_consts]
    return code.co_code, code.co_names, code.co_varnames, constants


def _compiled(definition: ast.FunctionDef, function: Any, norm_act: Any) -> Any:
    """A function like the given one with this definition: same globals, defaults, class for super(), and lines."""
    outer = ast.parse(f"def make(__class__, {_CALL}): pass")
    outer.body[0].body = [definition]  # type: ignore[attr-defined]
    # never run: the compiler makes other calls of what a file imports at its top
    outer.body += [ast.Import([ast.alias(name)]) for name in _imported(function)]
    code = compile(ast.fix_missing_locations(outer), function.__code__.co_filename, "exec")
    for _ in range(2):  # into make, into the function
        code = next(constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells = {"__class__": types.CellType(), _CALL: types.CellType(norm_act)} | cells
    made = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__,
        tuple(cells[name] for name in code.co_freevars),
    )  # fmt: skip
    made.__kwdefaults__ = function.__kwdefaults__
    _dress(made, function)
    return made


def _imported(function: Any) -> list[str]:
    """The names that the function's file imports at its top."""
    lines, _ = inspect.findsource(function)
    symbols = symtable.symtable("".join(lines), function.__code__.co_filename, "exec").get_symbols()
    return [symbol.get_name() for symbol in symbols if symbol.is_imported()]


def _dress(made: Any, function: Any) -> None:
    for name in ("__doc__", "__annotations__", "__qualname__", "__module__"):
        setattr(made, name, getattr(function, name))
    made.__dict__.update(function.__dict__)


def _wrapped_again(wrapper: Any, inner: Any) -> Any:
    """A copy of a decorator's wrapper around another function."""
    old, cells = wrapper.__wrapped__, wrapper.__closure__ or ()
    hits = [cell for cell in cells if cell != types.CellType() and cell.cell_contents is old]
    if len(hits) != 1:
        raise Unreadable("its forward is decorated")
    closure = tuple(types.CellType(inner) if cell is hits[0] else cell for cell in cells)
    made = types.FunctionType(
        wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, closure
    )  # fmt: skip
    made.__kwdefaults__ = wrapper.__kwdefaults__
    _dress(made, wrapper)
    made.__wrapped__ = inner  # type: ignore[attr-defined]
    return made


class _Finder:
    """Finds the pairs of a function and rewrites its tree."""

    def __init__(
        self, norms: Collection[str], activations: Mapping[str, str | None], definition: ast.FunctionDef
    ) -> None:
        self.norms = norms
        self.activations = activations
        self.definition = definition
        self.found: dict[str, str] = {}
        names = [node for node in ast.walk(definition) if isinstance(node, ast.Name)]
        loads = [node.id for node in names if isinstance(node.ctx, ast.Load)]
        others = [node.id for node in names if not isinstance(node.ctx, ast.Load)]
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        functions = [node for node in ast.walk(definition) if isinstance(node, kinds) and node is not definition]
        # read by functions inside, maybe later
        self.captured = {node.id for inner in functions for node in ast.walk(inner) if isinstance(node, ast.Name)}
        # written once and read once: nobody else can see what they hold
        self.passing = {name for name in loads if loads.count(name) == 1 == others.count(name)}

    def visit_body(self, node: Any) -> None:
        """Rewrite the statements of a compound statement, the innermost first."""
        if isinstance(node, ast.Try | ast.TryStar | ast.FunctionDef | ast.ClassDef) and node is not self.definition:
            return  # a handler may see the variables half way; the variables of others are not ours
        for field in ("body", "orelse"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                for statement in statements:
                    self.visit_body(statement)
                setattr(node, field, self._statements(statements))
        for case in getattr(node, "cases", ()):
            self.visit_body(case)

    def _statements(self, statements: _Statements) -> _Statements:
        done: _Statements = []
        rest = list(statements)
        while rest:
            statement = rest.pop(0)
            if isinstance(statement, ast.If) and rest and self._takes_in(statement, rest[0]):
                for body in (statement.body, statement.orelse):
                    body.append(copy.deepcopy(rest[0]))
                rest.pop(0)
                self.visit_body(statement)
            elif rest and (joined := self._joined(statement, rest)) is not None:
                rest = joined
                continue
            elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Return | ast.Expr):
                statement = _Nested(self).visit(statement)
            done.append(statement)
        return done

    def _takes_in(self, branch: ast.If, follower: ast.stmt) -> bool:
        """Whether `v = act(v)`, put at the end of both branches, comes to stand behind a norm in one of them."""
        name = _target(follower)
        if name is None or self._activation(_value(follower), name) is None:
            return False
        return any(self._ends_in_norm(body, name) for body in (branch.body, branch.orelse))

    def _ends_in_norm(self, body: _Statements, name: str) -> bool:
        at = len(body) - 1
        if at >= 0 and isinstance(last := body[at], ast.If):
            return self._ends_in_norm(last.body, name) or self._ends_in_norm(last.orelse, name)
        while at > 0 and (_film(body[at], name) or _residual(body[at], name)):
            at -= 1
        return at >= 0 and _target(body[at]) == name and self._norm(_value(body[at])) is not None

    def _joined(self, statement: ast.stmt, rest: _Statements) -> _Statements | None:
        """`v = norm(x)` and what follows it, with the norm taken into the statement that has the activation; None if
        there is no such thing.
        """
        name, call = _target(statement), _value(statement)
        norm = self._norm(call)
        if name is None or name in self.captured or norm is None or not isinstance(call, ast.Call):
            return None
        used, more = 0, dict[str, ast.expr]()
        if film := _film(rest[0], name):
            used, more = 1, {"scale": film[0], "shift": film[1]}
        if used < len(rest) and (residual := _residual(rest[used], name)):
            used, more = used + 1, more | {"residual": residual[0], "inplace": ast.Constant(residual[1])}
        place = self._activated(rest[used], name) if used < len(rest) else None
        if place is None:
            return None
        self.found[norm] = ast.unparse(place.func)
        _replace(rest[used], place, self._norm_act(norm, place, call.args[0], more))
        return rest[used:]

    def _norm_act(self, norm: str, activation: ast.Call, x: ast.expr, more: dict[str, ast.expr]) -> ast.Call:
        name = self.activations[ast.unparse(activation.func)]
        if name == "gelu" and activation.keywords:
            name = "gelu_tanh"
        keywords = [ast.keyword(key, value) for key, value in more.items()]
        second = activation.func if name is None else ast.Constant(name)
        first = ast.parse(norm, mode="eval").body
        call = ast.Call(ast.Name(_CALL, ast.Load()), [first, second, x], keywords)
        return ast.fix_missing_locations(ast.copy_location(call, activation))

    def _norm(self, value: ast.expr | None) -> str | None:
        """The text of the norm if this is a call of one, with one argument."""
        if isinstance(value, ast.Call) and len(value.args) == 1 and not value.keywords:
            text = ast.unparse(value.func)
            if text in self.norms and not isinstance(value.args[0], ast.Starred | ast.NamedExpr):
                return text
        return None

    def _activation(self, value: ast.expr | None, name: str) -> ast.Call | None:
        """A value as a call, if it is an activation of the variable and nothing else."""
        call = self._activation_call(value)
        return call if call and isinstance(call.args[0], ast.Name) and call.args[0].id == name else None

    def _activation_call(self, value: ast.expr | None) -> ast.Call | None:
        if not isinstance(value, ast.Call) or len(value.args) != 1 or ast.unparse(value.func) not in self.activations:
            return None
        name = self.activations[ast.unparse(value.func)]
        for keyword in value.keywords:
            inplace = keyword.arg == "inplace" and name is not None and isinstance(keyword.value, ast.Constant)
            tanh = keyword.arg == "approximate" and name == "gelu" and ast.unparse(keyword.value) == "'tanh'"
            if not inplace and not tanh:
                return None
        return value

    def _activated(self, statement: ast.stmt, name: str) -> ast.Call | None:
        """Where a statement applies an activation to the variable, before it does anything else, if that is the last
        that is seen of the variable's value.
        """
        value = _value(statement)
        if value is None or _reads(statement, name) != 1:
            return None
        last = isinstance(statement, ast.Return) or _target(statement) == name or name in self.passing
        while last and isinstance(value, ast.Call):
            found = self._activation(value, name)
            if found is not None:
                return found
            if not _is_path(value.func) or not value.args:
                return None
            value = value.args[0]
        return None


class _Nested(ast.NodeTransformer):
    """Rewrites act(norm(x)) and act(norm(x) + r) inside expressions."""

    def __init__(self, finder: _Finder) -> None:
        self.finder = finder

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if self.finder._activation_call(node) is None:
            return node
        inner, more = node.args[0], dict[str, ast.expr]()
        if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Add) and isinstance(inner.right, ast.Name):
            more = {"residual": inner.right}
            inner = inner.left
        elif isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Add) and isinstance(inner.left, ast.Name):
            more = {"residual": inner.left}
            inner = inner.right
        norm = self.finder._norm(inner)
        if norm is None:
            return node
        assert isinstance(inner, ast.Call)
        self.finder.found[norm] = ast.unparse(node.func)
        return self.finder._norm_act(norm, node, inner.args[0], more)

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:  # its variables are others
        return node


def _target(statement: ast.stmt) -> str | None:
    """The variable, if the statement gives a value to one and does nothing else."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    if isinstance(statement, ast.AnnAssign) and statement.value and isinstance(statement.target, ast.Name):
        return statement.target.id
    return None


def _value(statement: ast.stmt) -> ast.expr | None:
    return getattr(statement, "value", None) if isinstance(statement, ast.Assign | ast.AnnAssign | ast.Return) else None


def _film(statement: ast.stmt, name: str) -> tuple[ast.expr, ast.expr] | None:
    """s and t of `v = v * (1 + s) + t`."""
    match _value(statement):
        case ast.BinOp(
            ast.BinOp(ast.Name(v), ast.Mult(), ast.BinOp(ast.Constant(1), ast.Add(), ast.Name() as scale)),
            ast.Add(),
            ast.Name() as shift,
        ) if v == name == _target(statement) and name not in {scale.id, shift.id}:
            return scale, shift
    return None


def _residual(statement: ast.stmt, name: str) -> tuple[ast.expr, bool] | None:
    """r of `v = v + r`, `v = r + v` and `v += r`, and whether it was the last of these."""
    match statement:
        case ast.AugAssign(ast.Name(v), ast.Add(), ast.Name() as r) if v == name != r.id:
            return r, True
    match _value(statement):
        case ast.BinOp(ast.Name() as a, ast.Add(), ast.Name() as b) if _target(statement) == name:
            if a.id == name != b.id:
                return b, False
            if b.id == name != a.id:
                return a, False
    return None


def _is_path(node: ast.expr) -> bool:
    """Whether it is a.b.c."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _reads(node: ast.AST, name: str) -> int:
    return sum(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) for n in ast.walk(node))


def _replace(statement: Any, old: ast.Call, new: ast.Call) -> None:
    """Put a call in the place of another one in a statement."""
    if statement.value is old:
        statement.value = new
        return
    outer = statement.value
    while outer.args[0] is not old:
        outer = outer.args[0]
    outer.args[0] = new

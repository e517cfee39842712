"""`python -m groupnorm.bench.whole.memory '[model, mode, dtype, memory format, threads, converted]'` prints the peak of
memory of one call, in bytes: a process of its own for each, because a peak cannot be taken back.
"""

import json
import sys

from groupnorm.bench.whole.cases import select
from groupnorm.bench.whole.runner import ModelWork, peak_of

if __name__ == "__main__":
    name, mode, dtype, memory_format, threads, converted = json.loads(sys.argv[1])
    (model,) = (model for model in select(name) if model.name == name)
    print(json.dumps(peak_of(ModelWork(model, mode, dtype, memory_format, threads), converted)))

"""Group Normalization from file to file, for arrays larger than memory: .npy, .npz and .safetensors.

from groupnorm.files import group_norm_file
print(group_norm_file("x.npy", "y.npy", 32, weight="w.npy", max_memory=1 << 30))

stream.py    the road from call to report: checks, then reading, computing and writing at the same time
boxes.py     how an array is cut so that each part fits in memory
work.py      what is computed on one part, in one pass or in several
source.py    an array in a file, read by ranges        npy.py      the header of a .npy file
sink.py      an array written to a file, in order
report.py    what was moved, how fast, and what was the bound
"""

from groupnorm.files.report import Report
from groupnorm.files.stream import group_norm_file

__all__ = ["Report", "group_norm_file"]

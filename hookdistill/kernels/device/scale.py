"""Many tensors times one number on the device, in one launch."""

import triton
import triton.language as tl


@triton.jit
def scale(table, factor, tensors, DTYPE: tl.constexpr, BLOCK: tl.constexpr, COPY: tl.constexpr):
    """Write each tensor of the table times ``factor``; where that is one, nothing is to be done but for a ``COPY``.

    The table has for each tensor whence, whereto and how many elements. All programs share the blocks of each, so that their
    number depends on the device and not on the tensors: a factor of one costs a launch, and no more.
    """
    by = tl.load(factor)
    if COPY or by != 1.0:
        for tensor in range(0, tensors):
            record = table + tensor * 3
            source = tl.multiple_of(tl.load(record).to(tl.pointer_type(DTYPE)), 16)
            target = tl.multiple_of(tl.load(record + 1).to(tl.pointer_type(DTYPE)), 16)
            count = tl.load(record + 2)
            blocks = count // BLOCK
            for block in range(tl.program_id(0).to(tl.int64), blocks, tl.num_programs(0)):
                at = block * BLOCK + tl.arange(0, BLOCK)
                tl.store(target + at, (tl.load(source + at).to(tl.float32) * by).to(DTYPE))
            if blocks % tl.num_programs(0) == tl.program_id(0):
                at = blocks * BLOCK + tl.arange(0, BLOCK)
                tl.store(target + at, (tl.load(source + at, mask=at < count).to(tl.float32) * by).to(DTYPE), mask=at < count)

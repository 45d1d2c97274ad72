"""What runs on the device. All arithmetic is float32, whatever the tensors are; offsets of rows are 64 bits wide.

Two habits have a reason outside of the mathematics. What is loaded becomes float32 at once, because Triton's interpreter, in
which the tests run where there is no GPU, computes with the bit patterns of bfloat16. And numbers come through tables in device
memory rather than as arguments: so a new temperature compiles nothing, and the host waits for none.
"""

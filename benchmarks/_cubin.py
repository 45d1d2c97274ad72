"""What a kernel becomes for a GPU that need not be there: compiled by Triton and the assembler that comes with it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hookdistill.kernels.launching import Launched

CAPABILITY = 90
ALIGNED = 16
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
"""How Triton writes a pointer to a dtype."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """The figures of a kernel.

    Attributes:
        spilled: bytes that a thread writes to and reads from local memory because registers were not enough.
        loads_of_16: how many load instructions read 16 bytes of global memory.
        narrow_loads: how many read two bytes or one, as rows of half precision are read that are not aligned.
        doubles: instructions in float64.
    """

    kernel: str
    warps: int
    registers: int
    spilled: int
    stack: int
    shared: int
    loads_of_16: int
    narrow_loads: int
    stores_of_16: int
    doubles: int
    tensor_cores: int
    instructions: int


def compiled(launched: Launched) -> Compiled:
    """Compile a launch as Triton would for these very arguments, of which it knows what is a multiple of 16."""
    kernel = launched.kernel
    names = kernel.arg_names[: len(launched.arguments)]
    constants = dict(launched.constants)
    signature, multiples = {}, {}
    for position, (name, argument) in enumerate(zip(names, launched.arguments, strict=True)):
        if isinstance(argument, torch.Tensor):
            signature[name] = POINTERS[argument.dtype]
            multiple = argument.data_ptr() % ALIGNED == 0
        else:
            signature[name] = "i32"
            multiple = argument % ALIGNED == 0
            if argument == 1:
                constants[name] = 1
        if name in constants:
            signature[name] = "constexpr"
        elif multiple:
            multiples[(position,)] = [["tt.divisibility", ALIGNED]]
    signature |= dict.fromkeys(launched.constants, "constexpr")
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=multiples)
    target = GPUTarget("cuda", CAPABILITY, 32)
    options = {"num_warps": launched.warps, "maxnreg": launched.registers}
    if launched.stages is not None:
        options["num_stages"] = launched.stages
    result = triton.compile(source, target=target, options=options)
    return _figures(kernel.__name__, launched.warps, result)


def _figures(name: str, warps: int, result: triton.compiler.CompiledKernel) -> Compiled:
    said, code = _assembled(result.asm["ptx"])
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert spills is not None and registers is not None, said
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", code, re.MULTILINE)
    loads = [each for each in instructions if each.startswith("LDG")]
    return Compiled(
        kernel=name,
        warps=warps,
        registers=int(registers[1]),
        spilled=int(spills[2]) + int(spills[3]),
        stack=int(spills[1]),
        shared=int(result.metadata.shared),
        loads_of_16=sum(".128" in each for each in loads),
        narrow_loads=sum(".U16" in each or ".U8" in each or ".S8" in each for each in loads),
        stores_of_16=sum(each.startswith("STG") and ".128" in each for each in instructions),
        doubles=sum(
            re.match(r"D(ADD|MUL|FMA|SETP)|F2F\.F64|F2F\.F32\.F64|I2F\.F64", each) is not None for each in instructions
        ),
        tensor_cores=sum(re.match(r"HGMMA|HMMA", each) is not None for each in instructions),
        instructions=sum(each != "NOP" for each in instructions),
    )


def _assembled(ptx: str) -> tuple[str, str]:
    """What the assembler says of a program, and its instructions."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx, encoding="utf-8")
        command = [tools / "ptxas", "-v", f"-arch=sm_{CAPABILITY}a", source, "-o", binary]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        code = subprocess.run([tools / "cuobjdump", "-sass", binary], capture_output=True, text=True, check=True).stdout
    return said, code

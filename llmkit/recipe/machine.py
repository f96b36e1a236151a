"""`machine`: how the work is done here. Everything else in a recipe says what is wanted."""

from typing import Annotated, Literal

from pydantic import Field

from llmkit.recipe.block import Block
from llmkit.recipe.units import Count, Several, Size, Whole


class Slurm(Block):
    """What Slurm has to know about the jobs of `machine.engine: slurm`."""

    partition: str = ""
    """The partition; needed."""
    time: Annotated[str, Field(pattern=r"^[0-9]+([:-][0-9:]+)?$")] = "24:00:00"
    """The limit of a job, as sbatch takes it."""
    cpus: Count = 1
    """Processor cores of a job."""
    memory: Size = 4_000_000_000
    """Memory of a core."""
    arguments: dict[str, str] = {}
    """Further settings of sbatch by their long names: `{account: nlp}`."""
    setup: str = ""
    """Shell commands that a job runs first, such as `module load python`."""
    max_array: Several = 1000
    """The largest job array that this Slurm takes (its MaxArraySize)."""


class Parallel(Block):
    """The product of all numbers is the number of processes."""

    replicate: Count | Literal["auto"] = "auto"
    """Groups of processes that hold the model once each and read different rows; `auto`: what the others leave."""
    shard: Count | Literal["auto"] = "auto"
    """Processes that share weights, gradients and optimizer of one copy and read different rows (FSDP2)."""
    tensor: Count = 1
    """Processes that share every layer of one copy and read the same rows (tensor parallel)."""
    expert: Count = 1
    """Processes that share the experts of a mixture of experts."""
    context: Count = 1
    """Processes that share every row (context parallel); not built, and refused with the reason."""
    pipeline: Count = 1
    """Processes that hold different layers; not built, and refused with the reason."""


class LocalSteps(Block):
    """Processes take steps of their own and meet every so many: local SGD, or DiLoCo with an outer optimizer."""

    every: Count
    """Steps from one meeting to the next."""
    lr: Annotated[float, Field(gt=0)] = 1.0
    """Of the outer step along the mean of what processes have changed; 1 with no momentum is plain averaging."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Nesterov momentum of the outer step; DiLoCo: `lr: 0.7, momentum: 0.9`."""


class Communication(Block):
    """What processes send each other."""

    gradients: Literal["fp32", "fp16", "bf16", "powersgd"] = "fp32"
    """How replicated models' gradients travel; all but `fp32` change the result a little."""
    rank: Count = 4
    """Of the matrices that `powersgd` sends."""
    local_steps: LocalSteps | None = None
    """Meet every so many steps instead of at each; for slow links. The result is another one."""


class Machine(Block):
    """How the work is done here. No shipped recipe needs it: `auto` is chosen for the machine at hand."""

    device: Literal["auto", "cpu", "cuda", "mps", "tpu"] = "auto"
    """Where to compute. `tpu` trains in `pretrain` only, and nobody has run it on a chip yet (docs/tpu.md)."""
    nodes: Count = 1
    """Machines that work together; each runs the same command (`--nodes`, or `llmkit submit`)."""
    processes: Annotated[Whole, Field(ge=1)] | Literal["auto"] = "auto"
    """Worker processes on all nodes together, one per device; `auto`: every GPU, or one on CPU."""
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] | Parallel = "auto"
    """How processes share rows and model. `ddp`: every process holds all of it; `fsdp`: all share weights, gradients
    and optimizer; `hsdp`: those of a node share, nodes hold copies; or numbers: `{shard: 4, tensor: 2}`. `auto`: `ddp`
    where the model fits, else the least sharing with which it does."""
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    """Activations that the backward pass computes again instead of keeping: of whole blocks (`full`), of all but the
    matrix products (`selective`); `auto`: the least with which the model fits."""
    offload: bool = False
    """Keep shards of weights and optimizer in the host's memory between uses; on GPUs, where `shard` is more than 1."""
    communication: Communication = Communication()
    """What processes send each other, and how often."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """`bf16` computes matrix products in bfloat16, `fp8` those of the blocks in 8 bits, weights stay fp32; `auto`: bf16
    where the hardware has it."""
    compile: bool | Literal["auto", "graphs"] = "auto"
    """Compile the model with torch.compile; `auto`: when the run is long enough to win the time back; `graphs`: record
    the kernels of a step as CUDA graphs too, for small models on a GPU."""
    attention: Literal["auto", "sdpa", "eager", "compiled", "flex"] = "auto"
    """The attention kernel; `auto` probes which is fastest here for the run's shapes. `flex` passes over what packed
    documents do not see of each other; on GPUs only."""
    liger: bool = False
    """Take Liger's kernels for norms, rotations and gated layers, where it has them for the architecture; only on
    GPUs."""
    micro_batch: Count | Literal["auto"] = "auto"
    """Rows a device holds at once; the rest of the batch is accumulated."""
    loader_workers: Annotated[Whole, Field(ge=0)] = 0
    """Processes of each training process that prepare batches ahead; 0 does it in a thread, which is faster unless
    preparing takes long. The result is the same."""
    background_save: bool | Literal["auto"] = "auto"
    """Write checkpoints while training goes on, from a copy in memory; `auto`: where there is memory for the copy."""
    workers: Annotated[Whole, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes that prepare and tokenize text; `auto`: one a core. The result is the same with any number."""
    engine: Literal["here", "local", "slurm"] = "here"
    """Who prepares and tokenizes text: `here`, this command's own processes; `slurm`, a job array on a cluster
    that shares this folder, by datatrove; `local`, the same on this machine, to try it. The result is the same."""
    slurm: Slurm = Slurm()
    """What Slurm has to know."""

"""What other tools' keys are called here: Hugging Face TrainingArguments, axolotl, LLaMA-Factory."""

from collections.abc import Mapping
from typing import NamedTuple


class Foreign(NamedTuple):
    """A key of another tool.

    Attributes:
        key: The dotted key here.
        note: What differs, as a sentence; empty when nothing does.
    """

    key: str
    note: str = ""


_BATCH = Foreign("pretrain.train.batch", "it counts over all devices and accumulation: `32 samples`")
_CHOSEN = "the machine chooses it from the batch; nothing needs to be set"
_LENGTH = "pretrain.train.length"
_EVERY_EVAL = Foreign("pretrain.eval.every", "`500 steps` or `10%`")
_EVERY_SAVE = Foreign("pretrain.checkpoint.every", "`500 steps`, `10%` or `10m`")
_CONTEXT = Foreign("pretrain.model.context")
_MODEL = Foreign("pretrain.model.name")
_BETAS = Foreign("pretrain.train.optim.betas", "both together: `[0.9, 0.95]`")
_FILES = Foreign("pretrain.data", "a list of sources: `- {files: data/*.txt}`")
_DTYPE = Foreign("machine.precision", "chosen by itself; `bf16` or `fp32` pins it")
_COMPILE = Foreign("machine.compile", "chosen by itself; `true` or `false` pins it")

FOREIGN: Mapping[str, Foreign] = {
    "learning_rate": Foreign("pretrain.train.optim.lr"),
    "max_lr": Foreign("pretrain.train.optim.lr"),
    "min_lr": Foreign("pretrain.train.optim.min_lr_ratio", "a share of the peak: `0.1`"),
    "lr_scheduler_type": Foreign("pretrain.train.optim.schedule"),
    "lr_scheduler": Foreign("pretrain.train.optim.schedule"),
    "warmup_ratio": Foreign("pretrain.train.optim.warmup", "as `2%`"),
    "warmup_steps": Foreign("pretrain.train.optim.warmup", "as `500 steps`"),
    "optimizer": Foreign("pretrain.train.optim.name"),
    "adam_beta1": _BETAS,
    "adam_beta2": _BETAS,
    "adam_epsilon": Foreign("pretrain.train.optim.eps"),
    "label_smoothing_factor": Foreign("pretrain.train.label_smoothing"),
    "max_grad_norm": Foreign("pretrain.train.grad_clip"),
    "gradient_clipping": Foreign("pretrain.train.grad_clip"),
    "per_device_train_batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "batch_size": _BATCH,
    "global_batch_size": _BATCH,
    "micro_batch_size": Foreign("machine.micro_batch", _CHOSEN),
    "per_device_eval_batch_size": Foreign("machine.micro_batch", _CHOSEN),
    "gradient_accumulation_steps": Foreign("machine.micro_batch", _CHOSEN),
    "num_train_epochs": Foreign(_LENGTH, "as `3 epochs`"),
    "num_epochs": Foreign(_LENGTH, "as `3 epochs`"),
    "epochs": Foreign(_LENGTH, "as `3 epochs`"),
    "max_steps": Foreign(_LENGTH, "as `20k steps`"),
    "max_tokens": Foreign(_LENGTH, "as `50M tokens`"),
    "save_steps": _EVERY_SAVE,
    "save_strategy": _EVERY_SAVE,
    "save_total_limit": Foreign("pretrain.checkpoint.keep"),
    "eval_steps": _EVERY_EVAL,
    "eval_strategy": _EVERY_EVAL,
    "evaluation_strategy": _EVERY_EVAL,
    "max_eval_samples": Foreign("pretrain.eval.rows"),
    "val_set_size": Foreign("pretrain.held_out", "a share of the documents: `1%`"),
    "bf16": _DTYPE,
    "fp16": Foreign("machine.precision", "`bf16` or `fp32`; fp16 is not offered"),
    "tf32": _DTYPE,
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "mixed_precision": _DTYPE,
    "torch_compile": _COMPILE,
    "flash_attention": Foreign("machine.attention", "chosen by itself"),
    "attn_implementation": Foreign("machine.attention", "chosen by itself"),
    "num_processes": Foreign("machine.processes"),
    "no_cuda": Foreign("machine.device", "as `cpu`"),
    "use_cpu": Foreign("machine.device", "as `cpu`"),
    "sequence_len": _CONTEXT,
    "max_seq_length": _CONTEXT,
    "seq_length": _CONTEXT,
    "cutoff_len": _CONTEXT,
    "block_size": _CONTEXT,
    "base_model": _MODEL,
    "model_name_or_path": _MODEL,
    "model_name": _MODEL,
    "tokenizer_name": Foreign("pretrain.tokenizer"),
    "tokenizer_name_or_path": Foreign("pretrain.tokenizer"),
    "sample_packing": Foreign(
        "pretrain.isolate_documents", "rows are always packed; `true` keeps documents apart"
    ),
    "packing": Foreign("pretrain.isolate_documents", "rows are always packed; `true` keeps documents apart"),
    "datasets": _FILES,
    "dataset_name": Foreign("pretrain.data.dataset"),
    "dataset_config_name": Foreign("pretrain.data.dataset", "as `owner/name:config`"),
    "train_file": _FILES,
    "text_column": Foreign("pretrain.data.columns.text"),
    "text_column_name": Foreign("pretrain.data.columns.text"),
    "output_dir": Foreign("name", "the run's folder is `runs/<name>`"),
    "run_name": Foreign("name"),
    "data_seed": Foreign("seed", "one seed rules everything random"),
    "do_eval": Foreign("eval", "a section: its presence means yes"),
    "do_train": Foreign("pretrain", "a section: its presence means yes"),
}

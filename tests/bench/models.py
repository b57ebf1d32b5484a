"""What the store's benchmarks store: models with really trained weights, blown up to any size.

python -m tests.bench.models DIR [--gb 0.7]

A small Llama learns the Python standard library's own modules for 300 steps of AdamW in fp32, its rate falling from
1e-3 to 1e-4; a fresh AdamW tunes it on the library's packages for 120 steps, falling from 2e-5 to 0. Both ends, rounded
to bf16, are the real pair. The big pair has the same tensors in other shapes: each is filled with permutations of the
elements of its counterpart, the same one in both models but another for every repetition. So each weight and its update
are a pair that training made, and nowhere do two runs of bytes repeat.

base, tuned          the big pair: a dense model and its full fine-tune
merged               base with a LoRA of rank 16 on q_proj and v_proj added in fp32, whose updates have the standard
                     deviation of the fine-tune's there
base-fp32            as base, in fp32 with half the layers
small-base, -tuned   the real pair
steps/N              the checkpoints of the small model's first training: fp32, with the optimizer's state
"""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from llmos_cli.formats.safetensors import encode_header

STEPS: Final = 300
TUNING_STEPS: Final = 120
CHECKPOINTS: Final = (210, 240, 270, 300)
CONTEXT, BATCH, VOCABULARY, LAYERS = 64, 4, 2048, 4
RANK: Final = 16
FILE: Final = "model.safetensors"

State = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]
Words = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Trained:
    base: State
    tuned: State


def train(steps: Path, rate: float = 2e-5) -> Trained:
    """The fp32 weights before and after the fine-tuning; checkpoints go to the folder `steps`."""
    torch.manual_seed(0)
    library = Path(os.__file__).parent
    own, packages = (_text(sorted(library.glob(pattern))) for pattern in ("*.py", "[a-r]*/*.py"))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([own], vocab_size=VOCABULARY, show_progress=False)
    model = LlamaForCausalLM(small_config())

    def falling(step: int) -> float:
        return 1e-3 * min(step / 20, 0.1 + 0.45 * (1 + math.cos(math.pi * step / STEPS)))

    def save(step: int, optimizer: torch.optim.Optimizer) -> None:
        if step in CHECKPOINTS:
            _save_checkpoint(steps / str(step), model, optimizer)

    _learn(model, tokenizer.encode(own).ids, STEPS, falling, save)
    base = {name: value.detach().clone() for name, value in model.state_dict().items()}
    _learn(
        model,
        tokenizer.encode(packages).ids,
        TUNING_STEPS,
        lambda step: rate * min(step / 10, 1 - (step - 1) / TUNING_STEPS),
        lambda step, optimizer: None,
    )
    return Trained(base, {name: value.detach() for name, value in model.state_dict().items()})


def _text(paths: Sequence[Path]) -> str:
    return "\n".join(path.read_text("utf-8", errors="replace") for path in paths)[:4_000_000]


def _learn(
    model: LlamaForCausalLM,
    tokens: Sequence[int],
    steps: int,
    rate: Callable[[int], float],
    after: Callable[[int, torch.optim.Optimizer], None],
) -> None:
    data = torch.tensor(tokens)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, fused=True)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = rate(step)
        starts = torch.randint(0, len(data) - CONTEXT, (BATCH,)).tolist()
        rows = torch.stack([data[start : start + CONTEXT] for start in starts])
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after(step, optimizer)
        if step % 60 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.2f}", flush=True)


def _save_checkpoint(folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    (folder / "training").mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / FILE, {"format": "pt"})
    (folder / "config.json").write_text(model.config.to_json_string())
    moments = {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in ("exp_avg", "exp_avg_sq")
    }
    save_file(moments, folder / "training/state.safetensors")


def small_config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
    )


def big_config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=24,
        num_key_value_heads=6,
        vocab_size=32000,
        max_position_embeddings=2048,
    )


def shapes(config: LlamaConfig) -> Shapes:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).state_dict().items()}


def layers_for(gigabytes: float, width: int) -> int:
    """So that a big model of elements of `width` bytes has about that size."""
    without, one = (sum(math.prod(shape) for shape in shapes(big_config(layers)).values()) for layers in (0, 1))
    return max(1, round((gigabytes * 1e9 / width - without) / (one - without)))


def counterpart(name: str) -> str:
    """The small model's tensor that a big one's elements come from."""
    head, dot, rest = name.partition(".layers.")
    number, _, rest = rest.partition(".")
    return f"{head}.layers.{int(number) % LAYERS}.{rest}" if dot else name


def blown_up(sources: Sequence[Words], count: int, generator: np.random.Generator) -> list[Words]:
    """`count` elements of each source, all in the same order."""
    wholes = [np.empty(count, source.dtype) for source in sources]
    for at in range(0, count, len(sources[0])):
        order = generator.permutation(len(sources[0]))[: count - at]
        for whole, source in zip(wholes, sources, strict=True):
            np.take(source, order, out=whole[at : at + len(order)])
    return wholes


def merged(base: Words, shape: tuple[int, ...], spread: float, generator: torch.Generator) -> Words:
    """bf16 weights with B @ A of the standard deviation `spread` added."""
    b, a = (torch.randn(sides, generator=generator) for sides in ((shape[0], RANK), (RANK, shape[1])))
    weights = torch.from_numpy(base).view(torch.bfloat16).view(shape).float() + (b @ a) * (spread / math.sqrt(RANK))
    return words(weights, torch.bfloat16)


def words(tensor: torch.Tensor, dtype: torch.dtype) -> Words:
    kind = {torch.bfloat16: torch.uint16, torch.float32: torch.uint32}[dtype]
    return tensor.to(dtype).contiguous().view(-1).view(kind).numpy()


def start_file(folder: Path, config: LlamaConfig, dtype: str) -> Path:
    """A model folder whose file has a header and waits for the tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json_string())
    header = encode_header([(name, dtype, shape) for name, shape in shapes(config).items()], {"format": "pt"})
    (folder / FILE).write_bytes(header)
    return folder / FILE


def write_small(root: Path, small: Trained) -> None:
    for name, state in (("small-base", small.base), ("small-tuned", small.tuned)):
        with start_file(root / name, small_config(), "BF16").open("ab") as file:
            for tensor in shapes(small_config()):
                file.write(words(state[tensor], torch.bfloat16).data)


def write_big(root: Path, small: Trained, gigabytes: float) -> None:
    config = big_config(layers_for(gigabytes, 2))
    order, noise = np.random.default_rng(1), torch.Generator().manual_seed(1)
    paths = [start_file(root / name, config, "BF16") for name in ("base", "tuned", "merged")]
    with paths[0].open("ab") as base, paths[1].open("ab") as tuned, paths[2].open("ab") as with_lora:
        for name, shape in shapes(config).items():
            before, after = (state[counterpart(name)] for state in (small.base, small.tuned))
            pair = blown_up([words(state, torch.bfloat16) for state in (before, after)], math.prod(shape), order)
            base.write(pair[0].data)
            tuned.write(pair[1].data)
            if "q_proj" in name or "v_proj" in name:
                pair[0] = merged(pair[0], shape, float((after - before).std()), noise)
            with_lora.write(pair[0].data)


def write_fp32(root: Path, small: Trained, gigabytes: float) -> None:
    config, order = big_config(layers_for(gigabytes, 4)), np.random.default_rng(2)
    with start_file(root / "base-fp32", config, "F32").open("ab") as file:
        for name, shape in shapes(config).items():
            source = words(small.base[counterpart(name)], torch.float32)
            file.write(blown_up([source], math.prod(shape), order)[0].data)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dir", type=Path)
    parser.add_argument("--gb", type=float, default=0.7)
    options = parser.parse_args()
    small = train(options.dir / "steps")
    write_small(options.dir, small)
    write_big(options.dir, small, options.gb)
    write_fp32(options.dir, small, options.gb)
    (options.dir / "complete").touch()


if __name__ == "__main__":
    main()

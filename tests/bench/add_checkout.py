"""How fast and how small is `add` of a bf16 model, and how fast is `checkout`, against cp + fsync and the peers?

python -m tests.bench.add_checkout [--gb 0.7] [--rounds 5] [--dir DIR]
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from llmos_cli.formats.safetensors import encode_header
from tests.bench.measure import alternate, missing, print_machine, report, timed

LLMOS = [sys.executable, "-m", "llmos_cli", "-q"]


def make_model(path: Path, gigabytes: float) -> None:
    """A Llama-shaped safetensors file of normally distributed bf16 weights (hidden 1536, vocabulary 32000)."""
    hidden, inner, vocabulary = 1536, 4096, 32000
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    layer_bytes = 2 * sum(int(np.prod(shape)) for shape in layer.values())
    layers = max(1, round((gigabytes * 1e9 - 4 * vocabulary * hidden) / layer_bytes))
    tensors = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for number in range(layers):
        tensors |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(encode_header([(name, "BF16", shape) for name, shape in tensors.items()], {"format": "pt"}))
        for shape in tensors.values():
            values = random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=None, help="a folder on the disk to measure")
    options = parser.parse_args()
    print_machine()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        work = Path(name)
        model = work / "model.safetensors"
        make_model(model, options.gb)
        size = model.stat().st_size
        print(f"model: {size / 1e9:.2f} GB bf16 safetensors")
        notes: dict[str, str] = {}

        def fresh(path: str) -> Path:
            shutil.rmtree(work / path, ignore_errors=True)
            (work / path).unlink(missing_ok=True)
            subprocess.run(["sync"], check=True)
            return work / path

        def copy() -> float:
            target = fresh("copy")
            return timed(["sh", "-c", f"cp '{model}' '{target}' && sync '{target}'"])

        def llmos_add() -> float:
            store = fresh("store")
            timed([*LLMOS, "--store", str(store), "init"])
            seconds = timed([*LLMOS, "--store", str(store), "add", str(model), "model"])
            notes["llmos add"] = f"{folder_bytes(store) / size:.3f} of its size"
            return seconds

        def llmos_checkout() -> float:
            return timed([*LLMOS, "--store", str(work / "store"), "checkout", "model", str(fresh("out"))])

        def restic_add() -> float:
            repository = fresh("restic")
            secret = {"RESTIC_PASSWORD": "x"}
            timed(["restic", "init", "--repo", str(repository)], env=secret)
            seconds = timed(["restic", "backup", "--repo", str(repository), str(model)], env=secret)
            notes["restic backup"] = f"{folder_bytes(repository) / size:.3f} of its size"
            return seconds

        def borg_add() -> float:
            repository = fresh("borg")
            timed(["borg", "init", "--encryption=none", str(repository)])
            seconds = timed(["borg", "create", f"{repository}::a", str(model)])
            notes["borg create"] = f"{folder_bytes(repository) / size:.3f} of its size"
            return seconds

        runs = {"cp + fsync": copy, "llmos add": llmos_add}
        if not missing("restic"):
            runs["restic backup"] = restic_add
        if not missing("borg"):
            runs["borg create"] = borg_add
        report("add", alternate(runs, options.rounds), "cp + fsync", notes)
        report(
            "checkout",
            alternate({"cp + fsync": copy, "llmos checkout": llmos_checkout}, options.rounds),
            "cp + fsync",
            {},
        )
        if not subprocess.run(["cmp", str(model), str(work / "out" / model.name)], check=False).returncode:
            print("the checkout is byte for byte the model")


if __name__ == "__main__":
    main()

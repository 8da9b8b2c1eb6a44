"""Several GPUs of one host: the tests of shardings, the example, and how training scales.

    python scripts/multi_gpu.py REPORT.json

Needs two GPUs or more, the package and its extras `test` and `examples` (without matplotlib and
tqdm). Takes about two minutes. The exit status says whether tests and example passed.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = {
    "num_layers": 8,
    "width": 2048,
    "num_heads": 16,
    "num_kv_heads": 8,
    "head_dim": 128,
    "mlp_width": 5632,
}
SEQ_LEN = 4096
SEQUENCES = 4  # per GPU where the batch is split, else in all
STEPS = 14


def run_tests() -> dict:
    """What the plugin of tests/conftest.py reports of the tests of shardings."""
    with tempfile.TemporaryDirectory() as directory:
        report = pathlib.Path(directory, "report.json")
        # Not from the repository's root, where the package lies without its compiled module.
        subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-c", "../pyproject.toml", "--rootdir", ".."),
                # pytest-benchmark, where it is, warns beside xdist, and warnings are errors.
                *("-p", "no:benchmark"),
                *("-q", "-m", "multi_gpu", "-n", "4", "--gpu-report", str(report)),
                *("test_sharding.py", "test_explicit.py"),
            ],
            cwd=ROOT / "tests",
            env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            check=False,
        )
        return json.loads(report.read_text())


def run_example() -> dict:
    """Whether the example's losses agree, and what it printed."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "train_sharded.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stdout + result.stderr)
    return {"passed": result.returncode == 0, "output": result.stdout.splitlines()}


def measure() -> dict:
    """Tokens per second of training on one GPU and on two."""
    sys.path.insert(0, str(ROOT / "examples"))
    import jax
    import jax.numpy as jnp
    import numpy as np
    import train_sharded
    from gpt import GPTConfig

    config = GPTConfig(**MODEL, dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)

    def tokens_per_second(num_devices: int, tp: int, sequences: int) -> float:
        shape = (sequences, SEQ_LEN + 1)
        batches = [rng.integers(0, config.vocab_size, shape).astype(np.int32) for _ in range(STEPS)]
        mesh = train_sharded.make_mesh(jax.devices()[:num_devices], tp)
        return train_sharded.train(config, mesh, batches).tokens_per_second

    one = tokens_per_second(1, 1, SEQUENCES)
    data_parallel = tokens_per_second(2, 1, 2 * SEQUENCES)
    tensor_parallel = tokens_per_second(2, 2, SEQUENCES)
    return {
        "model": {**MODEL, "dtype": "bfloat16"},
        "sequences_per_gpu": SEQUENCES,
        "seq_len": SEQ_LEN,
        "timed_steps": STEPS - 2,
        "tokens_per_second": {
            "one_gpu": one,
            "two_gpus_data_parallel": data_parallel,
            "two_gpus_tensor_parallel": tensor_parallel,
        },
        "scaling_efficiency": {
            "data_parallel": data_parallel / (2 * one),
            "tensor_parallel": tensor_parallel / (2 * one),
        },
    }


def main() -> None:
    """Runs all and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=pathlib.Path)
    args = parser.parse_args()
    # The first JAX of this process starts last: it would take the GPUs' memory from the others.
    report = {**run_tests(), "example": run_example(), **measure()}
    args.report.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({x: report[x] for x in ("outcomes", "tokens_per_second")}, indent=1))
    outcomes = report["outcomes"]
    passed = outcomes["passed"] and not outcomes["failed"] and not outcomes["error"]
    sys.exit(not (passed and report["example"]["passed"]))


if __name__ == "__main__":
    main()

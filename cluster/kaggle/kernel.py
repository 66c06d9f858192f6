"""A Kaggle script: installs lltm_ray from an attached data set of wheels, serves a model, asks it, leaves a report."""

# ruff: noqa: D103, T201 - a script

import os
import shutil
import subprocess
import sys
from pathlib import Path

MODEL = os.environ.get(
    "LLTM_RAY_MODEL", "tiny"
)  # or the file name of an attached GGUF, or a catalogue name when online
PACKAGE = "lltm_ray[analytics]"
QUESTIONS = ("What is a slot?", "How do I start a fleet?")


def pip_arguments(root: Path = Path("/")) -> list[str]:
    """From the attached wheels, without the network, where there are any; else from the package index."""
    wheels = sorted((root / "kaggle/input").glob("**/lltm_ray-*.whl"))
    offline = ["--no-index", "--find-links", str(wheels[-1].parent)] if wheels else []
    return ["install", "--quiet", *offline, PACKAGE]


def unpack_server(root: Path = Path("/")) -> Path | None:
    """A CUDA build of llama-server, with its libraries, from an attached data set, which keeps no executable bits."""
    found = sorted((root / "kaggle/input").glob("**/llama-server"))
    if not found:
        return None
    folder = shutil.copytree(found[0].parent, root / "tmp/llama-server", dirs_exist_ok=True)
    server = Path(folder) / "llama-server"
    server.chmod(0o755)
    return server


def serve(**settings) -> None:
    from lltm_ray.integrations import kaggle
    from lltm_ray.sdk.guard import drain_before
    from lltm_ray.sdk.quick import quick_start

    machine = kaggle.detect()
    print(machine, f"{kaggle.time_left_s() / 3600:.1f} h left", sep="\n")
    with (
        quick_start(MODEL, machine=machine, **settings) as cluster,
        drain_before(cluster, seconds_left=300, folder=machine.kept_dir),
    ):
        for question in QUESTIONS:
            done = cluster.chat([{"role": "user", "content": question}], max_tokens=64)
            print(f"> {question}\n{done.text}\n{done.usage.output_tokens} tokens")
        for engine in cluster.status().engines:
            print(engine.name, f"GPUs {list(engine.gpu_ids)}", f"{engine.n_ctx} tokens", engine.detail)


if __name__ == "__main__":
    subprocess.run([sys.executable, "-m", "pip", *pip_arguments()], check=True)
    server = unpack_server()
    serve(**({"llama_server": str(server)} if server else {}))

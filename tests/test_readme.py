"""The README's commands and its Python are run as they stand, on own photos, where neither a network nor a GPU is needed.

Only places are exchanged: folders for temporary ones, the hub for a CSV (both are sources), `gpu.yaml` for `cpu.yaml`.
A training is made small by options behind the README's own, and has as many processes as two cores carry.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch

from roadwork.config import ModelConfig, save
from roadwork.models import RoadworkDetector
from tests.data.photos import encode, scene
from tests.inference.small_run import make
from tests.launching import ROOT, TINY, Job, environment, free_port


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of a language, lines joined at backslashes."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)
    return [block.replace("\\\n", " ") for block in found]


def command(start: str, places: dict[str, str]) -> list[str]:
    """The README's one command that holds these words, its places exchanged, as words to run."""
    lines = [" ".join(line.split()) for block in blocks("bash") for line in block.splitlines()]
    found = [line for line in lines if start in line]
    assert len(found) == 1, f"README.md has {len(found)} commands with {start!r}"
    words = [places.get(word, word) for word in shlex.split(found[0])]
    if words[0] == "accelerate":
        return [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words[1:]]
    return [sys.executable, *words[1:]]


def run(words: list[str]) -> str:
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the README's names stand for here: 24 photos with GPS in a CSV, a target region, folders."""
    folder = tmp_path_factory.mktemp("readme")
    lines = ["path,label,latitude,longitude,group"]
    for k in range(24):
        (folder / f"{k}.jpg").write_bytes(encode(scene(k, 320, 240)))
        lines.append(f"{k}.jpg,{k % 4 > 0:d},{40.4 + k / 50},{-80.0 + k / 50},drive-{k // 2}")
    (folder / "photos.csv").write_text("\n".join(lines) + "\n")
    (folder / "target.csv").write_text("latitude,longitude\n40.44,-79.99\n40.30,-79.54\n")
    return {
        "natix": f"csv:{folder}/photos.csv", "csv:/data/photos.csv": f"csv:{folder}/photos.csv",
        "target.csv": f"{folder}/target.csv", "shards/natix": f"{folder}/shards", "runs/natix": f"{folder}/run",
        "runs/mine": f"{folder}/mine", "runs/mine/shards": f"{folder}/mine/shards",
        "runs/hub": f"{folder}/hub", "runs/hub/shards": f"{folder}/hub/shards",
        "runs/whole": f"{folder}/whole", "runs/whole/shards": f"{folder}/whole/shards",
        "accelerate_configs/gpu.yaml": "accelerate_configs/cpu.yaml",
    }  # fmt: skip


def test_shards_are_built_described_and_a_run_is_foreseen(places: dict[str, str]) -> None:
    run([*command("python -m shards.build --source natix --out", places), "--view-size", "64"])
    assert Path(places["shards/natix"], "manifest.json").is_file()
    told = run(command("python -m shards.describe", places))
    assert "km" in told and "leak" in told.lower()
    words = command("launch/pretrain.py --run.dir runs/natix", places)
    words.insert(words.index("--config_file"), f"--main_process_port={free_port()}")
    told = run(words)
    assert "--dry_run" in words and "parameters:" in told and "disk:" in told


@pytest.mark.parametrize("folder", ["runs/mine", "runs/hub", "runs/whole"])
def test_the_pipeline_says_what_it_would_do(folder: str, places: dict[str, str]) -> None:
    if folder == "runs/hub":
        run(command("python -m shards.build --source natix --max-photos", places))
        assert Path(places["runs/hub/shards"], "manifest.json").is_file()
    told = run(
        [*command(f"launch/pipeline.py --config launch/configs/photos.yaml --run.dir {folder} ", places), "--dry_run"]
    )
    stages = ("shards", "pretrain", "dora_folds", "predict", "evaluate")
    assert all(f"{stage}: to do" in told for stage in stages)
    built = f"--source {places['natix']}" in told and "--test-fraction 0.2" in told
    assert built == (folder != "runs/hub"), "a sample is built by a command of its own"


SMALL = [
    *(word for word in TINY if "global_batch" not in word and "micro_batch" not in word),
    "--training.max_steps=1", "--engine.threads=1",
]  # fmt: skip


@pytest.mark.parametrize(("name", "processes", "batch"), [("small", 1, 32), ("node", 2, 256)])
def test_one_gpu_and_one_node_train_as_they_are_written(
    name: str, processes: int, batch: int, shards: Path, tmp_path: Path
) -> None:
    given = {"accelerate_configs/gpu.yaml": "accelerate_configs/cpu.yaml", "shards/natix": str(shards)}
    words = command(f"launch/pretrain.py --run.dir runs/{name} ", given | {f"runs/{name}": str(tmp_path)})
    words[words.index("--num_processes") + 1] = str(processes)
    words.insert(words.index("--config_file"), f"--main_process_port={free_port()}")
    said = run([*words, *SMALL])
    assert "pretrain finished at step 1 of 1\n" in said and "best weights: " in said
    (line,) = Path(tmp_path, "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["samples_seen"] == batch and len(list(tmp_path.glob("ranks/*.json"))) == processes


def test_many_nodes_train_as_it_is_written(shards: Path, tmp_path: Path) -> None:
    """Two launchers, each its own machine, meet on the loopback."""
    port = str(free_port())
    given = {
        "accelerate_configs/multinode.yaml": "accelerate_configs/multinode_cpu.yaml", "16": "2", "node-0": "127.0.0.1",
        "29500": port, "/shared/runs/big": str(tmp_path), "/shared/shards/natix": str(shards),
    }  # fmt: skip
    words = [*command("--num_machines 2", given), *SMALL, "--training.global_batch=32"]
    rank = words.index("--machine_rank") + 1
    jobs = [Job([*words[:rank], str(machine), *words[rank + 1 :]], environment()) for machine in range(2)]
    try:
        ended = [job.wait(600) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.status for job in ended] == [0, 0], ended[0].output[-2000:] + ended[1].output[-2000:]
    assert len(list(tmp_path.glob("ranks/*.json"))) == 2 and "pretrain finished at step 1" in ended[0].output


def test_a_folder_of_photos_becomes_a_csv(tmp_path: Path) -> None:
    for k in range(6):
        folder = tmp_path / ("with" if k % 2 else "without")
        folder.mkdir(exist_ok=True)
        (folder / f"{k}.jpg").write_bytes(encode(scene(k, 320, 240)))
    (script,) = (block for block in blocks("bash") if "find with" in block)
    done = subprocess.run(
        ["bash", "-euc", script.replace("/data/photos", str(tmp_path))],
        cwd=tmp_path.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "photos.csv").read_text().splitlines()
    assert lines[0] == "path,label"
    assert set(lines[1:]) == {f"{'with' if k % 2 else 'without'}/{k}.jpg,{k % 2}" for k in range(6)}
    run([sys.executable, "-m", "shards.build", "--source", f"csv:{tmp_path}/photos.csv",
                "--out", str(tmp_path / "shards"), "--view-size", "64", "--val-fraction", "0.3"])  # fmt: skip
    assert json.loads((tmp_path / "shards" / "manifest.json").read_text())["records"]["used"] == 6


def test_the_stages_after_training_run_as_they_are_written(tmp_path: Path) -> None:
    """On a run that somebody trained: the README's three commands, then TensorBoard, service and export as it says."""
    config = make(tmp_path)
    save(config, Path(config.run.dir, "config.yaml"))
    folder = config.run.dir
    trained = {
        "runs/natix": folder, "runs/natix/tensorboard": f"{folder}/tensorboard", "runs/demo/model": f"{folder}/model",
        "accelerate_configs/gpu.yaml": "accelerate_configs/cpu.yaml",
    }  # fmt: skip
    for stage in ("dora_folds", "predict", "evaluate"):
        words = command(f"launch/{stage}.py --run.dir runs/natix", trained)
        words.insert(words.index("--config_file"), f"--main_process_port={free_port()}")
        run(words)
    assert "MCC" in Path(folder, "report", "index.html").read_text()

    board = [str(Path(sys.executable).parent / "tensorboard"), *command("tensorboard --logdir", trained)[1:]]
    with serving(board, "data/runs") as url:
        assert json.loads(urlopen(f"{url}/data/runs").read()) == ["evaluate"], "no pre-training wrote events here"

    (tmp_path / "photo.jpg").write_bytes(encode(scene(1, 320, 240)))
    (asked,) = re.findall(r"`(curl [^`]*predict)`", (ROOT / "README.md").read_text())
    with serving(command("python launch/serve.py", trained), "health") as url:
        asked = asked.replace("http://127.0.0.1:8000", url).replace("photo.jpg", f"{tmp_path}/photo.jpg")
        answer = subprocess.run(shlex.split(asked), capture_output=True, text=True, timeout=60)
    assert 0 <= json.loads(answer.stdout)["probability"] <= 1, answer.stderr

    told = run(command("python launch/export.py", trained))
    assert all(Path(folder, "model", name).is_file() for name in ("onnx/model.onnx", "exported/model.pt2")), told


@contextmanager
def serving(words: list[str], path: str) -> Iterator[str]:
    """A server on a port of its own, once it answers at `path`; yields its address."""
    port = free_port()
    given = words[: words.index("--port")] if "--port" in words else words
    process = subprocess.Popen(
        [*given, "--port", str(port)], cwd=ROOT, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 200
    try:
        while True:
            try:
                urlopen(f"{url}/{path}", timeout=5).read()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until, f"{shlex.join(words)} does not answer"
                time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_python_of_the_readme_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    tiny = ModelConfig(
        backbone="test_vit", weights="random", prune_after=2, hidden_dim=32, num_layers=1, num_heads=4, num_kv_heads=2,
        expert_dim=24, segmentation_size=16,
    )  # fmt: skip
    RoadworkDetector(tiny, 64).eval().save_pretrained(tmp_path / "model")
    (tmp_path / "photo.jpg").write_bytes(encode(scene(1, 320, 240)))
    (code,) = blocks("python")
    for name, place in (("runs/demo/model", tmp_path / "model"), ("photo.jpg", tmp_path / "photo.jpg")):
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(str(place)))
    exec(compile(code, "README.md", "exec"), {})
    assert 0 <= float(capsys.readouterr().out) <= 1

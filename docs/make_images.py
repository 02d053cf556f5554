"""Take the images of the README: real commands in a real terminal, exported by rich as SVG.

Usage: python docs/make_images.py FOLDER
"""

import itertools
import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path

import pyte
import skimage.data
from PIL import Image
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, LINES = 100, 70
COLORS = {"red": "red", "green": "green", "blue": "blue", "cyan": "cyan", "magenta": "magenta", "brown": "yellow"}
"""Terminal colors by pyte's names; others are shown plain."""
MODEL_FILES = {
    "dit": "transformer/diffusion_pytorch_model*.safetensors",
    "text_encoder": "text_encoder/model*.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
CAPTIONS = {
    "chelsea": "a ginger cat",
    "coffee": "a cup of coffee on a wooden table",
    "rocket": "a rocket at night",
    "astronaut": "an astronaut",
}


def run_in_terminal(command: str, folder: Path, environment: dict[str, str]) -> pyte.Screen:
    """What a terminal shows when a command has ended."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    leader, follower = pty.openpty()
    size = {"COLUMNS": str(COLUMNS), "LINES": str(LINES), "TERM": "xterm-256color"}
    process = subprocess.Popen(
        command,
        shell=True,
        cwd=folder,
        env=os.environ | environment | size,
        stdout=follower,
        stderr=follower,
        stdin=follower,
    )
    os.close(follower)
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:
            break
        if not data:
            break
        stream.feed(data)
    process.wait()
    return screen


def as_text(screen: pyte.Screen, command: str) -> Text:
    """The screen with its colors, below the command."""
    text = Text(f"$ {command}\n", style="bold")
    rows = [row for row in range(LINES) if screen.display[row].strip()]
    for row in range(max(rows, default=-1) + 1):
        cells = [screen.buffer[row][column] for column in range(len(screen.display[row].rstrip()))]
        for (color, bold), group in itertools.groupby(cells, key=lambda cell: (COLORS.get(cell.fg), cell.bold)):
            text.append("".join(cell.data for cell in group), Style(color=color, bold=bold))
        text.append("\n")
    return text


def take(command: str, name: str, title: str, target: Path, folder: Path, environment: dict[str, str]) -> None:
    """Run a command and write its image."""
    text = as_text(run_in_terminal(command, folder, environment), command)
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere)
        console.print(text)
    (target / f"{name}.svg").write_text(console.export_svg(title=title, unique_id=name), encoding="utf-8")


def prepare(folder: Path) -> dict[str, str]:
    """Images with captions in `my_images`, tiny model files in `models`; returns the environment."""
    from diffsynth_core.models.registry import load_family

    (folder / "my_images").mkdir()
    for name, caption in CAPTIONS.items():
        Image.fromarray(getattr(skimage.data, name)()[..., :3]).save(folder / "my_images" / f"{name}.jpg", quality=95)
        (folder / "my_images" / f"{name}.txt").write_text(caption)
    for component, place in MODEL_FILES.items():
        load_family("qwen-image").write_tiny_weights(folder / "models", component, "Qwen/Qwen-Image", place)
    return {"XDG_CACHE_HOME": ".cache", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = prepare(folder)
        own = "diffsynth train --recipe qwen-image-lora --dataset_base_path my_images --max_steps 100"
        take(
            "diffsynth train --recipe qwen-image-lora --rehearse",
            "rehearsal",
            "a rehearsal",
            target,
            folder,
            environment,
        )
        take(own, "train", "a run on your own images (tiny weights)", target, folder, environment)
        take(
            f"{own} --output_path second",
            "second-run",
            "a second run on the same images",
            target,
            folder,
            environment,
        )
        faulty = f"{own} --lerning_rate 1e-4 --lora_rank lots --lora_target_modules to_q,to_x"
        take(faulty, "problems", "all problems at once", target, folder, environment)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

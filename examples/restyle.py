"""Write the images of a data folder in the style of another one, for domain adaptation: Fourier domain adaptation.

The amplitudes of low frequencies become those of an image of the target, and the phases stay. Labels stay where they
are: `,images=` behind the folder takes the new images.

    python examples/restyle.py gta5:/data/gta5 --like cityscapes:/data/cityscapes --beta 0.05 --out gta5-fda
    kdcache data check gta5:/data/gta5,images=gta5-fda

Run the same command again to continue after an interruption.

Source: Yang and Soatto 2020, arXiv 2004.05498 (FDA), equation 1.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from kdcache.data import Window, id_hash, open_split, prefetch, render
from kdcache.files import read_object, replacing, write_whole

SETTINGS = "restyled.json"


def fourier_transfer(source_HW3: np.ndarray, target_HW3: np.ndarray, beta: float) -> np.ndarray:
    """Return the source image with the target image's low-frequency amplitudes, channel by channel.

    Frequencies up to `int(beta * shorter side)` periods per image along each axis are replaced. If that is 0, only the
    mean colour is replaced. The target is first resized to the source's size, as published.

    Args:
        source_HW3: uint8 (H, W, 3) RGB.
        target_HW3: uint8 RGB of any size.
        beta: above 0 and at most 0.5. The paper uses 0.01, 0.05 and 0.09.

    Returns: uint8 (H, W, 3), rounded and clipped.
    """
    size = height, width = source_HW3.shape[:2]
    if target_HW3.shape[:2] != size:
        target_HW3 = render(target_HW3, None, Window.full(*target_HW3.shape[:2]), flip=False, size=size)[0]
    reach = int(min(size) * beta)
    spectrum, target_spectrum = (np.fft.rfft2(pixels, axes=(0, 1)) for pixels in (source_HW3, target_HW3))
    rows = np.flatnonzero(np.abs(np.fft.fftfreq(height, 1 / height)) <= reach)
    low = np.ix_(rows, np.arange(min(reach, width // 2) + 1))
    spectrum[low] = np.abs(target_spectrum[low]) * np.exp(1j * np.angle(spectrum[low]))
    return np.clip(np.rint(np.fft.irfft2(spectrum, s=size, axes=(0, 1))), 0, 255).astype(np.uint8)


def main() -> None:
    """Write the restyled images that the output folder does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="data folder whose images are restyled")
    parser.add_argument("--like", required=True, help="data set whose style they get")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new images, OUT/SPLIT/ID.png")
    parser.add_argument("--beta", type=float, default=0.01, help="reach of frequencies, as a part of the shorter side")
    parser.add_argument("--split", default="train", help="split of both data sets")
    parser.add_argument("--seed", type=int, default=0, help="decides which target image goes with which image")
    options = parser.parse_args()
    if not 0 < options.beta <= 0.5:
        parser.error(f"--beta is above 0 and at most 0.5, got {options.beta:g}")
    source, target = open_split(options.source, options.split), open_split(options.like, options.split)
    settings = {"source": options.source, "like": options.like, "beta": options.beta, "seed": options.seed}
    options.out.mkdir(parents=True, exist_ok=True)
    if read_object(options.out / SETTINGS) not in ({}, settings):
        parser.error(f"{options.out} was written with other settings ({SETTINGS} has them): give another --out")
    write_whole(options.out / SETTINGS, json.dumps(settings) + "\n")

    def write(index: int) -> None:
        path = options.out / options.split / f"{source.ids[index]}.png"
        if path.exists():
            return
        partner = int(np.random.default_rng((options.seed, id_hash(source.ids[index]))).integers(len(target)))
        restyled = fourier_transfer(source.image(index), target.image(partner), options.beta)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:  # whole or not at all
            Image.fromarray(restyled).save(partial, format="PNG")

    for _ in prefetch(write, range(len(source)), threads=4, ahead=8):
        pass
    print(f"{len(source)} images in {options.out}: use them as {options.source},images={options.out}")


if __name__ == "__main__":
    main()

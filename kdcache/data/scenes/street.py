"""Draw one procedural street: sky, facades, road, verges, then objects standing on the ground, by depth.

It is made to be small and hard in the ways real streets are. Road and verge are a quarter of the pixels each, poles one
percent and a pixel wide. Colours overlap (overcast sky and pale facades, asphalt and concrete, cars of any colour) and
shift from scene to scene with the light, so texture and place must be learned. Near objects hide far ones.

Depth is exact, along the axis of a pinhole camera with a focal length of `FOCAL` image heights, `CAMERA_HEIGHT` metres
(or the style's height) above level ground. Row r below the horizon shows ground at
`FOCAL * CAMERA_HEIGHT * height / (r + 0.5 - horizon)`. Objects stand upright on it, with all pixels at the depth of
the foot, which also decides the size. The ground ends in a bank at `GROUND_ENDS` metres, behind which the facades
stand, nearer to the sides. The sky has no depth (NaN).

It uses only numpy, elementwise arithmetic and one generator, so a seed always gives the same picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kdcache.data.sample import ClassList, Depth, Pixels
from kdcache.data.scenes.styles import STYLES, Colour, Style
from kdcache.tasks import IGNORE_INDEX

COLOURS = {
    "sky": (70, 130, 180),
    "building": (120, 90, 80),
    "road": (128, 64, 128),
    "vegetation": (107, 142, 35),
    "pole": (220, 220, 0),
    "vehicle": (0, 0, 142),
    "pedestrian": (220, 20, 60),
}
CLASSES = ClassList(tuple(COLOURS), tuple(COLOURS.values()))
CAMERA_HEIGHT = STYLES["default"].camera_height
"""Metres above the ground."""

FOCAL = 1.0
"""Focal length in image heights: a field of view of 53 degrees from top to bottom."""

GROUND_ENDS = 60.0
"""Metres; things stand at 36 to 48 metres at most, in every style nearer than this."""

FARTHEST = 80.0
"""Metres at which the facades at the vanishing point stand, and no other; those at the sides stand at `GROUND_ENDS`."""

SKY, BUILDING, ROAD, VEGETATION, POLE, VEHICLE, PEDESTRIAN = range(7)

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


def draw_street(
    rng: np.random.Generator, height: int, width: int, style: Style = STYLES["default"]
) -> tuple[Pixels, Pixels, Depth]:
    """Draw a procedural street scene.

    Args:
        rng: the only source of randomness.
        height: height of the image in pixels, at least 16.
        width: width of the image in pixels, at least 16.
        style: colours, objects and camera of the scene.

    Returns: (image, label, depth). The image is uint8 (height, width, 3) RGB. The label has class ids, uint8 (height,
        width), 255 for void. The depth is float32 (height, width) in metres, NaN in the sky.
    """
    scene = _Scene.draw(rng, height, width, style)
    scene.sky()
    scene.skyline()
    scene.ground()
    scene.things()
    return scene.photograph(), scene.annotate(), scene.metres


@dataclass
class _Scene:
    rng: np.random.Generator
    style: Style
    rgb: Floats
    ids: Pixels
    metres: Depth
    horizon: int
    vanishing_x: float
    road_x: float
    road_half: float

    @classmethod
    def draw(cls, rng: np.random.Generator, height: int, width: int, style: Style) -> _Scene:
        return cls(
            rng=rng,
            style=style,
            rgb=np.zeros((height, width, 3), np.float32),
            ids=np.zeros((height, width), np.uint8),
            metres=np.full((height, width), np.nan, np.float32),
            horizon=int(height * rng.uniform(*style.horizon)),
            vanishing_x=width * rng.uniform(0.3, 0.7),
            road_x=width * rng.uniform(0.35, 0.65),
            road_half=width * rng.uniform(*style.road_half),
        )

    @property
    def height(self) -> int:
        return int(self.ids.shape[0])

    @property
    def width(self) -> int:
        return int(self.ids.shape[1])

    def sky(self) -> None:
        rows, blue = self.horizon + 1, self.rng.uniform(*self.style.sky)
        top = np.array((195 - 110 * blue, 200 - 60 * blue, 208 + 10 * blue), np.float32)
        fade = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None]
        clouds = _noise(self.rng, rows, self.width, 3, 5)[..., None] * np.float32(self.rng.uniform(10, 60))
        self.rgb[:rows] = top + fade * (np.float32(215) - top) * np.float32(0.7) + clouds - np.float32(25)

    def skyline(self) -> None:
        """Draw a row of buildings from left to right, with gaps. They are higher towards the sides."""
        x = -int(self.rng.integers(0, self.width // 8 + 1))
        while x < self.width:
            wide = int(self.width * self.rng.uniform(0.07, 0.24)) + 2
            aside = min(abs(x + wide / 2 - self.vanishing_x) / self.width, 0.6)
            tall = int(self.horizon * min(self.rng.uniform(0.15, 0.6) + aside, 1.05))
            if self.rng.random() < self.style.built:
                self.facade(self.horizon - tall, x, wide, FARTHEST - (FARTHEST - GROUND_ENDS) * aside / 0.6)
            x += wide

    def facade(self, top: int, left: int, wide: int, metres: float) -> None:
        rng, y0, x0, x1 = self.rng, max(top, 0), max(left, 0), min(left + wide, self.width)
        y1 = min(self.horizon + max(self.height // 24, 1), self.height)
        if x1 <= x0 or y1 <= y0:
            return
        colour = self.one_of(self.style.facades) * np.float32(rng.uniform(0.65, 1.2))
        pitch_y, pitch_x = rng.integers(*self.style.windows), rng.integers(*self.style.windows)
        y, x = np.arange(y0, y1)[:, None] - top, np.arange(x0, x1)[None, :] - left
        windows = (y % pitch_y >= pitch_y // 2) & (x % pitch_x >= pitch_x // 2)
        glass = np.float32(rng.uniform(0.45, 1.25))
        wall = _noise(rng, y1 - y0, x1 - x0, 2, 2) * np.float32(0.3) + np.float32(0.85)
        wall = np.where(windows, wall * glass, wall)
        self.rgb[y0:y1, x0:x1] = colour * wall[..., None]
        self.ids[y0:y1, x0:x1] = BUILDING
        self.metres[y0:y1, x0:x1] = metres

    def ground(self) -> None:
        """Draw the verges on both sides, the road as a trapezoid to the vanishing point, and broken lane marks."""
        rng, rows = self.rng, self.height - self.horizon
        size, below = (rows, self.width), slice(self.horizon, None)
        depth = (np.arange(rows, dtype=np.float32) + np.float32(0.5))[:, None] / np.float32(rows)
        x = np.arange(self.width, dtype=np.float32)[None, :] + np.float32(0.5)
        offset = x - self.road_centre(depth)
        grass = self.one_of(self.style.greens) * np.float32(rng.uniform(*self.style.grass))
        tufts = self.grain(size, 0.35) * _noise(rng, rows, self.width, 6, 8)
        self.rgb[below] = grass * (np.float32(0.7) + np.float32(0.8) * tufts)[..., None]
        self.ids[below] = VEGETATION
        self.metres[below] = np.minimum(self.metres_at(depth), np.float32(GROUND_ENDS))
        grey = np.float32(rng.uniform(*self.style.road))
        asphalt = grey + np.array((4, 2, -2), np.float32) * np.float32(rng.normal())
        shade = np.float32(0.85) + np.float32(0.3) * _noise(rng, rows, self.width, 4, 3)
        marks = (np.abs(offset) < depth * np.float32(0.012 * self.width)) & ((depth * 9 + rng.random()) % 1 < 0.5)
        paint = np.where(marks, np.float32(1.6), shade)
        road = np.abs(offset) < self.road_reach(depth)
        self.rgb[below][road] = (asphalt * paint[..., None])[road]
        self.ids[below][road] = ROAD

    def metres_at(self, depth: Floats | float) -> Floats:
        """Return the distance in metres of ground at `depth`, from 0 (horizon) to 1 (lower edge of the image)."""
        scale = FOCAL * self.style.camera_height * self.height / (self.height - self.horizon)
        return np.asarray(scale / np.asarray(depth, np.float64), np.float32)

    def road_centre(self, depth: Floats | float) -> Floats:
        return np.asarray(self.vanishing_x + (self.road_x - self.vanishing_x) * depth, np.float32)

    def road_reach(self, depth: Floats | float) -> Floats:
        return np.asarray(0.015 * self.width + self.road_half * depth, np.float32)

    def things(self) -> None:
        """Draw everything that stands on the ground, from far to near. Most objects are far, as in perspective."""
        rng, style = self.rng, self.style
        makers = (
            [self.tree] * rng.integers(*style.trees)
            + [self.vehicle] * rng.integers(*style.vehicles)
            + [self.person] * rng.integers(*style.people)
            + [self.pole] * rng.integers(*style.poles)
        )
        depths = 0.1 + 0.9 * rng.random(len(makers)) ** 1.6
        for k in np.argsort(-depths, kind="stable")[::-1]:
            makers[k](float(depths[k]))

    def tree(self, depth: float) -> None:
        tall = self.height * self.scale(depth) * self.rng.uniform(0.6, 1.1)
        y, x, box = self.stand(depth, tall, tall * self.rng.uniform(0.5, 0.8), self.beside(depth, 0.1, 0.6))
        ragged = _noise(self.rng, *_size(box), 5, 5) + self.grain(_size(box), 0.25)
        crown = ((y - 0.38) / 0.38) ** 2 + (x / 0.5) ** 2 < ragged * np.float32(0.9)
        trunk = (np.abs(x) < 0.05) & (y > 0.5)
        green = self.one_of(self.style.greens) * np.float32(self.rng.uniform(0.5, 1.2))
        leaves = np.float32(1.25) - np.float32(0.5) * y + np.float32(0.5) * (ragged - np.float32(1))
        self.put(box, crown | trunk, green * leaves[..., None], VEGETATION, depth)

    def vehicle(self, depth: float) -> None:
        rng, wide = self.rng, self.width * self.scale(depth) * self.rng.uniform(0.2, 0.34)
        side = self.road_centre(depth) + self.road_reach(depth) * rng.uniform(-0.8, 0.8)
        y, x, box = self.stand(depth, wide * rng.uniform(0.5, 0.75), wide, float(side))
        cabin = (y < 0.5) & (np.abs(x) < 0.3 + 0.22 * y)
        wheels = (y > 0.88) & ((np.abs(x) > 0.42) | (np.abs(x) < 0.2))
        body = ((y >= 0.45) & (np.abs(x) < 0.49) & ~((y > 0.9) & (np.abs(x) < 0.2))) | cabin
        glass = cabin & (y > 0.1) & (y < 0.42) & (np.abs(x) < 0.2 + 0.22 * y)
        colour = np.float32(rng.uniform(40, 220)) + rng.normal(0, 26, 3).astype(np.float32)
        tone = np.where(glass, np.float32(0.45), np.float32(1.2) - np.float32(0.45) * y)
        tone = np.where(wheels, np.float32(0.3), tone)
        self.put(box, body, colour * tone[..., None], VEHICLE, depth)

    def person(self, depth: float) -> None:
        rng, tall = self.rng, self.height * self.scale(depth) * self.rng.uniform(0.34, 0.48)
        on_road = rng.random() < 0.25
        side = self.beside(depth, -0.9, -0.1) if on_road else self.beside(depth, 0.01, 0.25)
        y, x, box = self.stand(depth, tall, tall * 0.42, side)
        head = ((y - 0.1) / 0.1) ** 2 + (x / 0.22) ** 2 < 1
        trunk = ((y - 0.42) / 0.27) ** 2 + (x / 0.42) ** 2 < 1
        legs = (y > 0.55) & (np.abs(np.abs(x) - 0.08 - 0.22 * (y - 0.55)) < 0.14)
        shirt, trousers = self.one_of(self.style.clothes, size=2) * rng.uniform(0.6, 1.5, (2, 1))
        colour = np.where((y < 0.58)[..., None], shirt, trousers).astype(np.float32)
        colour = np.where(
            head[..., None], np.float32(rng.uniform(70, 190)) * np.array([1, 0.8, 0.68], np.float32), colour
        )
        self.put(box, head | trunk | legs, colour, PEDESTRIAN, depth)

    def pole(self, depth: float) -> None:
        rng, tall = self.rng, self.height * self.scale(depth) * self.rng.uniform(0.8, 1.3)
        thick = max(self.width * self.scale(depth) * 0.014, 1.0)
        wide = max(thick * 7, 3.0)
        y, x, box = self.stand(depth, tall, wide, self.beside(depth, 0.01, 0.2))
        mast = np.abs(x) * wide < thick * 0.5 + 0.01
        sign = (y < 0.16) & (np.abs(x) < 0.4) if rng.random() < 0.4 else (y < 0.03) & (x > 0)
        colour = np.float32(rng.uniform(55, 160)) * np.array([1, 1, 1.04], np.float32)
        self.put(box, mast | sign, colour * (np.float32(1.15) - np.float32(0.3) * (x > 0))[..., None], POLE, depth)

    def scale(self, depth: float) -> float:
        """Return the relative size of things at `depth`.

        Things look smaller to a higher camera, because they are farther away.
        """
        return depth * (CAMERA_HEIGHT / self.style.camera_height)

    def one_of(self, colours: tuple[Colour, ...], size: int | None = None) -> Floats:
        """Return one of the colours at random, float32 (3,), or `size` of them, (size, 3)."""
        return np.asarray(np.array(colours, np.float32)[self.rng.integers(len(colours), size=size)])

    def grain(self, size: tuple[int, int], strength: float) -> Floats:
        """Return a field of pixel noise. It repeats if the style has tiles."""
        side = self.style.tile
        if not side:
            return _grain(self.rng, size, strength)
        tile = _grain(self.rng, (side, side), strength)
        return np.tile(tile, (size[0] // side + 1, size[1] // side + 1))[: size[0], : size[1]]

    def beside(self, depth: float, low: float, high: float) -> float:
        """Return a random column left or right of the road.

        `low` and `high` are distances from its edge, in road half-widths.
        """
        edge = self.road_reach(depth) * (1 + self.rng.uniform(low, high))
        return float(self.road_centre(depth) + (edge if self.rng.random() < 0.5 else -edge))

    def stand(
        self, depth: float, tall: float, wide: float, centre: float
    ) -> tuple[Floats, Floats, tuple[slice, slice]]:
        """Return the box of an object whose foot is at `depth`, and the coordinates of its pixels.

        Returns: y from 0 (top) to 1 (foot) as (h, 1), x from -0.5 to 0.5 as (1, w), and the box as row and column
            slices, cut to the image.
        """
        foot = self.horizon + depth * (self.height - self.horizon)
        tall, wide = max(tall, 2.0), max(wide, 1.0)
        rows = np.arange(max(int(foot - tall), 0), min(int(np.ceil(foot)), self.height))
        columns = np.arange(max(int(centre - wide / 2), 0), min(int(np.ceil(centre + wide / 2)), self.width))
        y = ((rows + 0.5 - foot + tall) / tall).astype(np.float32)[:, None]
        x = ((columns + 0.5 - centre) / wide).astype(np.float32)[None, :]
        return y, x, (_span(rows), _span(columns))

    def put(self, box: tuple[slice, slice], mask: Mask, colour: Floats, label: int, depth: float) -> None:
        self.rgb[box] = np.where(mask[..., None], colour, self.rgb[box])
        self.ids[box] = np.where(mask, label, self.ids[box])
        self.metres[box] = np.where(mask, self.metres_at(depth), self.metres[box])

    def photograph(self) -> Pixels:
        """Return the image with the light of the day, haze, a soft lens and sensor noise."""
        rng, rgb, style = self.rng, self.rgb, self.style
        light = np.float32(rng.uniform(*style.light)) * rng.uniform(*style.tint, 3).astype(np.float32)
        light = light * (np.float32(0.75) + np.float32(0.5) * _noise(rng, self.height, self.width, 2, 3)[..., None])
        rgb = _saturated(rgb * light, style.saturation)
        if style.shade:
            rgb = rgb * _vignette(self.height, self.width, style.shade)
        for _ in range(style.blurs):
            rgb = _softened(rgb)
        noise = rng.standard_normal(rgb.shape, np.float32) * np.float32(rng.uniform(*style.noise))
        return np.clip(rgb + noise + np.float32(0.5), 0, 255).astype(np.uint8)

    def annotate(self) -> Pixels:
        """Return the class ids, with void along some borders, where a human annotator would be unsure."""
        border = np.zeros(self.ids.shape, bool)
        border[:, 1:] |= self.ids[:, 1:] != self.ids[:, :-1]
        border[1:] |= self.ids[1:] != self.ids[:-1]
        unsure = border & (_noise(self.rng, self.height, self.width, 4, 5) > 0.6)
        return np.where(unsure, np.uint8(IGNORE_INDEX), self.ids)


def _noise(rng: np.random.Generator, height: int, width: int, ny: int, nx: int) -> Floats:
    """Return smooth noise in [0, 1): a grid of (ny + 1, nx + 1) random values, enlarged bilinearly."""
    grid = rng.random((ny + 1, nx + 1), np.float32)
    y, x = (np.arange(n, dtype=np.float32) * np.float32(m / max(n, 1)) for n, m in ((height, ny), (width, nx)))
    iy, ix = np.minimum(y.astype(np.intp), ny - 1), np.minimum(x.astype(np.intp), nx - 1)
    fy, fx = (y - iy).astype(np.float32)[:, None], (x - ix).astype(np.float32)[None, :]
    rows = grid[iy] + (grid[iy + 1] - grid[iy]) * fy
    result: Floats = rows[:, ix] + (rows[:, ix + 1] - rows[:, ix]) * fx
    return result


def _grain(rng: np.random.Generator, size: tuple[int, int], strength: float) -> Floats:
    """Return noise for each pixel, uniform between 1 - strength and 1 + strength."""
    return np.float32(1 - strength) + rng.random(size, np.float32) * np.float32(2 * strength)


def _saturated(rgb: Floats, saturation: float) -> Floats:
    """Return colours moved away from grey (saturation above 1) or towards it. 1 returns them unchanged."""
    if saturation == 1:
        return rgb
    grey = rgb.mean(2, keepdims=True)
    return np.asarray(grey + (rgb - grey) * np.float32(saturation))


def _vignette(height: int, width: int, shade: float) -> Floats:
    """Return the light through a lens, (height, width, 1): 1 in the middle, and 1 - shade in the corners."""
    y, x = (((np.arange(n, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / n) - 1) ** 2 for n in (height, width))
    return np.asarray(1 - np.float32(shade / 2) * (y[:, None] + x[None, :]))[..., None]


def _softened(rgb: Floats) -> Floats:
    """Return each channel blurred by [1, 2, 1] / 4 along both axes, except at the border."""
    soft = rgb.copy()
    soft[:, 1:-1] = (rgb[:, :-2] + 2 * rgb[:, 1:-1] + rgb[:, 2:]) / 4
    soft[1:-1] = (soft[:-2] + 2 * soft[1:-1] + soft[2:]) / 4
    return soft


def _span(indices: npt.NDArray[np.int_]) -> slice:
    return slice(int(indices[0]), int(indices[-1]) + 1) if len(indices) else slice(0, 0)


def _size(box: tuple[slice, slice]) -> tuple[int, int]:
    return box[0].stop - box[0].start, box[1].stop - box[1].start

"""The styles of procedural scenes: materials, objects and camera.

`default` is the scenes' own style. `game` and `camera` are two domains for adaptation, as from rendered frames to
photographs: other textures, light, noise, camera heights and class frequencies, but the same classes. `game` has
repeated tiles, saturated colours, sharp and clean pictures, and many cars seen from low down. `camera` is dim, dull,
soft, noisy and darker at the edges, with people and poles seen from higher up.
"""

from __future__ import annotations

from dataclasses import dataclass

Range = tuple[float, float]
Counts = tuple[int, int]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Style:
    """The look of a procedural street: colours, objects, camera and light.

    A range (low, high) is drawn uniformly. A range of whole numbers excludes its end.

    Attributes:
        facades: base colours of buildings, (r, g, b) of 0 to 255.
        greens: base colours of plants.
        clothes: base colours of clothes.
        sky: range of the sky's blueness, from overcast (0) to clear (1).
        windows: range of the distance between windows in pixels.
        grass: range of the grass's brightness. 1 keeps the base colours.
        road: range of the asphalt's grey level, 0 to 255.
        tile: side in pixels of the repeated texture of ground and leaves. 0 does not repeat.
        trees: range of the number of trees.
        vehicles: range of the number of vehicles.
        people: range of the number of people.
        poles: range of the number of poles.
        built: the share of the skyline that has buildings, 0 to 1.
        horizon: range of the horizon's position, as a share of the image's height from the top.
        road_half: range of half the road's width at the lower edge, as a share of the image's width.
        camera_height: the camera's height above the ground in metres.
        light: range of the brightness of the day. 1 changes nothing.
        tint: lowest and highest factor of each colour channel.
        saturation: factor of the colours' distance from grey. 1 changes nothing.
        shade: the share of light that is lost in the corners, 0 to 1.
        blurs: how many times the image is blurred.
        noise: range of the sensor noise's standard deviation, in levels of 0 to 255.
    """

    facades: tuple[Colour, ...] = (
        (150, 148, 145),
        (172, 158, 138),
        (140, 95, 80),
        (110, 112, 120),
        (190, 188, 182),
    )
    greens: tuple[Colour, ...] = ((74, 96, 48), (96, 104, 60), (58, 78, 46), (118, 112, 72))
    clothes: tuple[Colour, ...] = ((60, 60, 70), (130, 60, 55), (70, 85, 120), (150, 140, 125), (90, 95, 70))
    sky: Range = (0.0, 1.0)
    windows: Counts = (4, 8)
    grass: Range = (0.8, 1.4)
    road: Range = (75, 150)
    tile: int = 0
    trees: Counts = (1, 6)
    vehicles: Counts = (1, 6)
    people: Counts = (1, 7)
    poles: Counts = (2, 7)
    built: float = 0.86
    horizon: Range = (0.36, 0.52)
    road_half: Range = (0.38, 0.7)
    camera_height: float = 2.3
    light: Range = (0.6, 1.15)
    tint: tuple[Colour, Colour] = ((0.85, 0.85, 0.85), (1.15, 1.15, 1.15))
    saturation: float = 1.0
    shade: float = 0.0
    blurs: int = 1
    noise: Range = (4, 12)


STYLES = {
    "default": Style(),
    "game": Style(
        facades=((196, 150, 104), (214, 188, 140), (168, 86, 66), (104, 128, 168), (222, 214, 196)),
        greens=((70, 128, 40), (104, 140, 48), (48, 104, 44), (140, 150, 60)),
        clothes=((30, 30, 50), (190, 40, 40), (40, 80, 180), (220, 200, 60), (60, 150, 80)),
        sky=(0.6, 1.0),
        windows=(5, 7),
        road=(90, 120),
        tile=6,
        vehicles=(3, 9),
        people=(0, 4),
        poles=(1, 4),
        horizon=(0.34, 0.46),
        road_half=(0.5, 0.8),
        camera_height=1.7,
        light=(0.95, 1.2),
        tint=((1.0, 0.95, 0.85), (1.1, 1.05, 0.95)),
        saturation=1.35,
        blurs=0,
        noise=(0, 1.5),
    ),
    "camera": Style(
        facades=((120, 108, 98), (138, 130, 120), (118, 88, 78), (96, 98, 104), (160, 158, 152)),
        greens=((66, 78, 52), (84, 88, 62), (54, 66, 48), (100, 98, 74)),
        clothes=((45, 45, 52), (88, 62, 60), (62, 70, 88), (110, 104, 98), (72, 74, 64)),
        sky=(0.0, 0.35),
        windows=(3, 8),
        grass=(0.7, 1.2),
        road=(60, 105),
        trees=(2, 8),
        vehicles=(1, 4),
        people=(2, 9),
        poles=(3, 9),
        horizon=(0.42, 0.54),
        road_half=(0.34, 0.6),
        camera_height=2.6,
        light=(0.6, 1.05),
        tint=((0.82, 0.9, 0.95), (0.98, 1.02, 1.15)),
        saturation=0.7,
        shade=0.3,
        blurs=2,
        noise=(8, 16),
    ),
}

"""The kernel of `render`: crop, resize and flip an image and its label, byte for byte as Pillow resizes.

Pillow's 8-bit filter is two integer passes, columns first, each rounded to whole levels. Its coefficients are doubles
rounded to 22 bits. All of that is repeated here, including its float32 box. Pillow 13 takes rows first if
`h - H > 2 * (w - W)` and more than 0, for a picture of h x w resized to H x W, which changes some pixels by one level.
Here the order is always that of Pillow 3 to 12, so a cache's bytes do not depend on its version.

Pillow spends most of a small view on preparation (four copies, RGB to RGBX and back). At 144 x 192 a draw takes 0.08 ms
where Pillow's way took 0.7, and 720 x 960 to 288 x 384 takes 1.0 ms where it took 5.2 (one core of a Zen 3).

- Columns: a pixel is four lanes of int32 (the fourth is the next pixel's red, overwritten by it), two taps at a time.
  LLVM does not vectorise plain loops for this, which take twice to four times as long.
- Rows: lanes run along the row. A ring holds the last rows of the first pass, as many as the filter is high, so they
  stay in the cache whatever the image's size.

The outermost output's centre is inside the image, but its cell may stick out by up to half a step, and Pillow wants
its box within the picture. So the picture is extended. Each margin repeats the mean that this output must have: adding
that to a weighted mean does not change it. When shrinking, no other output's triangle reaches the margin. When
enlarging, the mean is the edge pixel, which is right for all. Pixels of a margin are equal, so one of them takes all
their weight.

Legend: "inside" outputs have their centre inside the source. The part is the source pixels that their filter can touch.
The picture is the part with at most one pixel of margin on either side. X counts bytes of a row, three to a pixel.
"""

import math

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from kdcache.data.rendering.compiled import BYTES, OPTIONS, READ_ONLY_BYTES, kernel, njit

_BITS = 22
_HALF = 1 << (_BITS - 1)
_VOID = np.uint8(255)
_i = np.int32

_INT, _LONG = ir.IntType(32), ir.IntType(64)
_LANES, _PIXEL = ir.VectorType(_INT, 4), ir.VectorType(ir.IntType(8), 4)


@intrinsic
def _weigh(typing_context, line, begin, weights, first, taps, out, to):
    """Write the weighted sum of `taps` pixels, 4 bytes each, to out[to : to + 4].

    Pixel t begins at line[begin + 3 * t], and its weight is weights[first + t]. `taps` is even and at least 2. One byte
    beyond the last pixel is read and written.
    """

    def generate(context, builder, signature, arguments):
        def address(array, index):
            data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
            return builder.gep(data, [arguments[index]])

        line, weights, out = address(0, 1), address(2, 3), address(5, 6)
        entry, loop, done = builder.block, builder.append_basic_block("taps"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        tap, total = builder.phi(_LONG), builder.phi(_LANES)
        added = total
        for t in (tap, builder.add(tap, _LONG(1))):
            place = builder.gep(line, [builder.mul(t, _LONG(3))])
            pixel = builder.zext(builder.load(builder.bitcast(place, _PIXEL.as_pointer()), align=1), _LANES)
            weight = builder.insert_element(_LANES(ir.Undefined), builder.load(builder.gep(weights, [t])), _INT(0))
            weight = builder.shuffle_vector(weight, _LANES(ir.Undefined), _LANES([0] * 4))
            added = builder.add(added, builder.mul(pixel, weight))
        following = builder.add(tap, _LONG(2))
        for phi, at_first, later in ((tap, _LONG(0), following), (total, _LANES([_HALF] * 4), added)):
            phi.add_incoming(at_first, entry)
            phi.add_incoming(later, loop)
        builder.cbranch(builder.icmp_signed("<", following, arguments[4]), loop, done)
        builder.position_at_end(done)
        levels = builder.lshr(added, _LANES([_BITS] * 4))
        levels = builder.select(builder.icmp_unsigned("<", levels, _LANES([255] * 4)), levels, _LANES([255] * 4))
        builder.store(builder.trunc(levels, _PIXEL), builder.bitcast(out, _PIXEL.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(line, types.int64, weights, types.int64, types.int64, out, types.int64), generate


@njit(**OPTIONS)
def _centre(start, step, output):
    return start + (output + 0.5) * step


@njit(**OPTIONS)
def _overhang(distance):
    """Return how many whole pixels cover a distance, or 0 below a millionth of a pixel, which is a rounding error."""
    return math.ceil(distance) if distance > 1e-6 else 0


@njit(**OPTIONS)
def _inside(start, stop, outputs, length):
    """Return the range [first, end) of output pixels whose centre is inside the source."""
    step = (stop - start) / outputs
    first = 0
    while first < outputs and _centre(start, step, first) < 0.0:
        first += 1
    last = first
    while last < outputs and _centre(start, step, last) < length:
        last += 1
    return first, last


@njit(**OPTIONS)
def _filter(start, stop, outputs, length, first, last):
    """Return the filter coefficients of one axis.

    Returns: the first source pixel of the part and its length, the lengths of both margins, where each inside output's
        taps begin in the picture, and their weights (inside outputs, taps). The number of taps is even.
    """
    step = (stop - start) / outputs
    reach = math.ceil(max(1.0, step)) + 1
    low = start + first * step
    high = stop if last == outputs else start + last * step
    origin = max(math.floor(low) - reach, 0)
    part = min(math.ceil(high) + reach, length) - origin
    before, after = _overhang(origin - low), _overhang(high - origin - part)
    extended = before + part + after
    # From here on as Pillow's precompute_coeffs.
    box_low = np.float32(max(low - origin + before, 0.0))
    box_high = np.float32(min(high - origin + before, float(extended)))
    inside = last - first
    scale = np.float64(np.float32(box_high - box_low)) / inside
    support = max(scale, 1.0)
    begins, ends = np.empty(inside, np.int64), np.empty(inside, np.int64)
    most = 0
    for output in range(inside):
        centre = _centre(np.float64(box_low), scale, output)
        begins[output] = max(int(centre - support + 0.5), 0)
        ends[output] = min(int(centre + support + 0.5), extended)
        most = max(most, ends[output] - begins[output])
    margin = 1 if before > 0 else 0
    taps = min(most, margin + part + 1)
    weights = np.zeros((inside, taps + taps % 2), np.int32)
    places = np.empty(inside, np.int64)
    narrow = 1.0 / support
    for output in range(inside):
        centre = _centre(np.float64(box_low), scale, output)
        total = 0.0
        for tap in range(begins[output], ends[output]):
            total += max(1.0 - abs((tap - centre + 0.5) * narrow), 0.0)
        place = max(begins[output] - before, -margin) + margin
        places[output] = place
        for tap in range(begins[output], ends[output]):
            weight = max(1.0 - abs((tap - centre + 0.5) * narrow), 0.0) / total
            at = min(max(tap - before, -margin), part) + margin
            weights[output, at - place] += _i(0.5 + weight * (1 << _BITS))
    return origin, part, before, after, places, weights


@njit(**OPTIONS)
def _triangle(centre, support, part):
    """Return the first tap of a margin's mean, and all taps' weights. `centre` is in pixels of the part."""
    low, high = max(math.floor(centre - support), 0), min(math.ceil(centre + support) + 1, part)
    weights = np.empty(high - low)
    total = 0.0
    for tap in range(len(weights)):
        weights[tap] = max(1.0 - abs(low + tap + 0.5 - centre) / support, 0.0)
        total += weights[tap]
    for tap in range(len(weights)):
        weights[tap] /= total
    return low, weights


@njit(**OPTIONS)
def _mean_row(image_HX, top, left, first, weights, total, line, at):
    """Write the weighted mean of the part's rows, from `first` on, to line[at:]. `total` is scratch memory."""
    length = len(total)
    total[:] = 0.0
    for tap in range(len(weights)):
        row = image_HX[top + first + tap, left : left + length]
        for x in range(length):
            total[x] += weights[tap] * row[x]
    target = line[at : at + length]
    for x in range(length):
        target[x] = _i(np.rint(total[x]))


@njit(**OPTIONS)
def _mean_pixel(line, begin, weights, to):
    """Write the weighted mean of the pixels that begin at byte `begin` of `line` to byte `to`."""
    for channel in range(3):
        total = 0.0
        for tap in range(len(weights)):
            total += weights[tap] * line[begin + 3 * tap + channel]
        line[to + channel] = _i(np.rint(total))


@njit(**OPTIONS)
def _add_rows(ring, begin, last, weights, total, out):
    """Write the weighted sum of the picture's rows, from `begin` on, to `out`.

    Row r is ring[r % len(ring)], up to `last`.
    """
    length, taps = len(out), len(weights)
    total[:] = _HALF
    for tap in range(0, taps, 2):
        p = ring[min(begin + tap, last) % len(ring), :length]
        q = ring[min(begin + tap + 1, last) % len(ring), :length]
        w, v = weights[tap], weights[tap + 1]
        if tap < taps - 2:
            for x in range(length):
                total[x] += _i(_i(_i(p[x]) * w) + _i(_i(q[x]) * v))
        else:
            for x in range(length):
                level = _i(total[x] + _i(_i(p[x]) * w) + _i(_i(q[x]) * v)) >> _i(_BITS)
                out[x] = min(level, _i(255))


@njit(**OPTIONS)
def _resize(image_HX, window, flip, size, y_range, x_range, pixels_HX):
    """Write the image's inside outputs to `pixels_HX`."""
    y0, x0, y1, x1 = window
    width = image_HX.shape[1] // 3
    top, part_h, above, below, y_begins, y_weights = _filter(y0, y1, size[0], len(image_HX), y_range[0], y_range[1])
    left, part_w, before, after, x_begins, x_weights = _filter(x0, x1, size[1], width, x_range[0], x_range[1])
    if flip:
        x_begins, x_weights = x_begins[::-1].copy(), x_weights[::-1].copy()
    y_step, x_step = (y1 - y0) / size[0], (x1 - x0) / size[1]
    column = 3 * (size[1] - x_range[1] if flip else x_range[0])
    length, left, part = 3 * len(x_begins), 3 * left, 3 * part_w
    begin = 3 if before else 0
    taps = x_weights.shape[1]
    flat_weights = x_weights.reshape(-1)
    line = np.empty(begin + part + 3 * taps + 4, np.uint8)
    ring = np.empty((y_weights.shape[1], length + 1), np.uint8)
    mean, total = np.empty(part), np.empty(length, np.int32)
    last = part_h - 1 + (1 if above else 0) + (1 if below else 0)
    drawn = 0
    for i in range(len(y_begins)):
        while drawn <= min(y_begins[i] + len(ring) - 1, last):
            row = drawn - (1 if above else 0)
            if 0 <= row < part_h:
                source, target = image_HX[top + row, left : left + part], line[begin : begin + part]
                for x in range(part):
                    target[x] = source[x]
            else:
                edge = y_range[0] if row < 0 else y_range[1] - 1
                first, weights = _triangle(_centre(y0, y_step, edge) - top, max(1.0, y_step), part_h)
                _mean_row(image_HX, top, left, first, weights, mean, line, begin)
            if before:
                first, weights = _triangle(_centre(x0, x_step, x_range[0]) - left // 3, max(1.0, x_step), part_w)
                _mean_pixel(line, begin + 3 * first, weights, begin - 3)
            if after:
                first, weights = _triangle(_centre(x0, x_step, x_range[1] - 1) - left // 3, max(1.0, x_step), part_w)
                _mean_pixel(line, begin + 3 * first, weights, begin + part)
            out = ring[drawn % len(ring)]
            for j in range(len(x_begins)):
                _weigh(line, 3 * x_begins[j], flat_weights, j * taps, taps, out, 3 * j)  # type: ignore[call-arg]
            drawn += 1
        _add_rows(ring, y_begins[i], last, y_weights[i], total, pixels_HX[y_range[0] + i, column : column + length])


@njit(**OPTIONS)
def _pick(label_HW, window, flip, size, y_range, x_range, out_HW):
    """Write the label's inside outputs to `out_HW`: each takes the label pixel that contains its centre."""
    y0, x0, y1, x1 = window
    y_step, x_step = (y1 - y0) / size[0], (x1 - x0) / size[1]
    columns = np.empty(x_range[1] - x_range[0], np.int64)
    for j in range(len(columns)):
        columns[len(columns) - 1 - j if flip else j] = int(_centre(x0, x_step, x_range[0] + j))
    begin = size[1] - x_range[1] if flip else x_range[0]
    for i in range(y_range[0], y_range[1]):
        row, target = label_HW[int(_centre(y0, y_step, i))], out_HW[i, begin : begin + len(columns)]
        for j in range(len(columns)):
            target[j] = row[np.uint64(columns[j])]


@kernel(
    READ_ONLY_BYTES[2], READ_ONLY_BYTES[2], types.UniTuple(types.float64, 4), types.boolean,
    types.UniTuple(types.int64, 3), BYTES[2], BYTES[2],
)  # fmt: skip
def render_window(image_HX, label_HW, window, flip, outside, pixels_HX, out_HW):
    """Fill `pixels_HX` and `out_HW` with a window of an image and its label.

    The image is resized with an antialiased bilinear filter. Each output label is the label at the centre of its pixel.

    Args:
        image_HX: RGB image, uint8 (H, 3 * W).
        label_HW: class ids, uint8 (H, W), or an empty array without a label. Then `out_HW` becomes void.
        window: (y0, x0, y1, x1) in source pixels.
        flip: whether to mirror left and right after the resize.
        outside: (r, g, b) of pixels beyond the image.
        pixels_HX: uint8 (height, 3 * width), which gets the image.
        out_HW: uint8 (height, width), which gets the label.
    """
    size = out_HW.shape
    y0, x0, y1, x1 = window
    y_range = _inside(y0, y1, size[0], len(image_HX))
    x_range = _inside(x0, x1, size[1], image_HX.shape[1] // 3)
    inside = (y_range[1] - y_range[0], x_range[1] - x_range[0])
    if inside != size:
        for i in range(size[0]):
            for j in range(size[1]):
                for channel in range(3):
                    pixels_HX[i, 3 * j + channel] = outside[channel]
    if inside != size or label_HW.size == 0:
        out_HW[:] = _VOID
    if inside[0] > 0 and inside[1] > 0:
        _resize(image_HX, window, flip, size, y_range, x_range, pixels_HX)
        if label_HW.size > 0:
            _pick(label_HW, window, flip, size, y_range, x_range, out_HW)

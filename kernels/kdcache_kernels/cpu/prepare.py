"""The CPU kernels before and after the loss: logits to nodes, labels to factors, gradients from nodes.

All of them work at low resolution or on one number per pixel, and cost a fifth of the loss at 11 classes.

Legend: B batch, C classes, H W label size, h w a tensor's own size, P phases, n nodes or pixels of a tile.
"""

import numpy as np

from .math import kernel

_f = np.float32


@kernel
def to_nodes(first, last, logits, scale, limit, index, fraction, runs, nodes, lost, ranges):
    """Normalise a range of logit rows for the CPU loss, and resample each row to its nodes.

    Nodes are the positions on a logit row where the loss kernels need a value. A row is cut into tiles of n nodes. A
    normalised logit is (logit - maximum over the classes) * log2(e) / T. The rows are `first` to `last` - 1, and row i
    of image b has the number b * h + i.

    Shapes and units:
        logits: (B, C, h, w) float32.
        scale: log2(e) / T.
        limit: the largest magnitude of a usable logit. A position with another logit is lost: all its classes become 0.
        index, fraction: (Bt, tiles, n) logit to the left of each node, and the weight of the logit to its right. Bt is
            B, or 1 if all images share them.
        runs: (Bt, tiles, 2) first and end index of a run of nodes that lie exactly on consecutive logits. These nodes
            are copied instead of interpolated.
        nodes: (B, h, tiles, C, n) float32 result, at most 0.
        lost: (B, h, w) bool result.
        ranges: (B, h) float32 result. r is the largest (maximum - minimum over the classes) of a row's positions that
            are not lost. A row gets r, or -1 - r if one of its positions is lost.
    """
    _, C, h, w = logits.shape
    _, _, tiles, _, n = nodes.shape
    largest, smallest = np.empty(w, _f), np.empty(w, _f)
    clean, usable = np.empty(w + 1, _f), np.empty(w, np.uint8)
    for task in range(first, last):
        b, i = task // h, task % h
        bt = b if index.shape[0] > 1 else 0
        largest[:], smallest[:], usable[:] = -np.inf, np.inf, 1
        for c in range(C):
            row = logits[b, c, i]
            for j in range(w):
                x = row[j]
                usable[j] &= abs(x) <= limit
                largest[j] = max(largest[j], x)
                smallest[j] = min(smallest[j], x)
        widest, loses = _f(0), False
        for j in range(w):
            lost[b, i, j] = usable[j] == 0
            if usable[j] != 0:
                widest = max(widest, largest[j] - smallest[j])
            else:
                loses = True
        ranges[b, i] = -_f(1) - widest if loses else widest
        for c in range(C):
            row = logits[b, c, i]
            for j in range(w):
                clean[j] = scale * (row[j] - largest[j]) if usable[j] != 0 else _f(0)
            clean[w] = clean[w - 1]
            for tile in range(tiles):
                taps, fractions, line = index[bt, tile], fraction[bt, tile], nodes[b, i, tile, c]
                start, end = runs[bt, tile, 0], runs[bt, tile, 1]
                for k in range(start):
                    a = clean[taps[k]]
                    line[k] = a + fractions[k] * (clean[taps[k] + np.uint32(1)] - a)
                if start < end:
                    line[start:end] = clean[taps[start] : taps[start] + np.uint32(end - start)]
                for k in range(end, n):
                    a = clean[taps[k]]
                    line[k] = a + fractions[k] * (clean[taps[k] + np.uint32(1)] - a)


@kernel
def from_nodes(first, last, upper, lower, index, fraction, gradient):
    """Carry a gradient from the nodes back to a range of logit rows, the transpose of the resampling of `to_nodes`.

    Nodes are the positions on a logit row at which the loss kernels read interpolated logits. Each row is cut into
    tiles of n nodes. The rows are `first` to `last` - 1, and row i of image b has the number b * h + i. Row i gets
    upper[i] + lower[i - 1].

    Shapes and units:
        upper, lower: (B, h, tiles, C, n) gradient from the label pixels between logit rows i and i + 1: the share of
            row i (upper) and of row i + 1 (lower).
        index, fraction: (tiles, n) logit to the left of each node, and the weight of the logit to its right.
        gradient: (B, C, h, w) float32 result.
    """
    _, h, tiles, C, n = upper.shape
    w = gradient.shape[3]
    row = np.empty(w + 1, _f)
    for task in range(first, last):
        b, i = task // h, task % h
        for c in range(C):
            row[:] = 0
            for tile in range(tiles):
                for k in range(n):
                    g = upper[b, i, tile, c, k]
                    if i > 0:
                        g += lower[b, i - 1, tile, c, k]
                    right = fraction[tile, k] * g
                    row[index[tile, k]] += g - right
                    row[index[tile, k] + np.uint32(1)] += right
            row[w - 1] += row[w]
            gradient[b, c, i] = row[:w]


@kernel
def count_pixels(
    first, last, labels, ignore_index, class_weight, label_weight, share, pixel_weight, inside_y, inside_x,
    use_ce, use_kl, skip_void, pitch, offset, ids, weight, gate, spread, counts,
):  # fmt: skip
    """Write the class id and the weights of every label pixel of a range of label rows, and count the denominators.

    The rows are `first` to `last` - 1, and row y of image b has the number b * H + y. Results are stored tile by tile
    (a tile is a part of a label row), in P phases of n entries. Entry k of phase p of a tile is column P * (tile *
    pitch + k) + p - offset. Entries with k >= pitch, or without such a column, get 0.

    Shapes and units:
        labels: (B, H, W) of any integer dtype, or (0, 0, 0) without labels.
        ignore_index: label of void pixels, which CE does not count.
        class_weight: (C,) float32.
        label_weight, pixel_weight: (B, H, W) float32 weights of pixels in CE and in KL, or (0, 0, 0) for ones.
        share: the part of a label that label smoothing distributes over all classes, in [0, 1).
        inside_y, inside_x: (Bt, H) and (Bt, W) bool, whether a label row or column lies in the target's view. Bt is B,
            or 1 if all images share one view.
        use_ce, use_kl: which terms to count.
        skip_void: whether KL leaves out void pixels.
        ids: (B, H, tiles, P, n) result, class ids, 0 if CE does not count the pixel.
        weight: the same shape, result: class weight * (1 - share) * label weight, or 0 if CE does not count the pixel.
        gate: the same shape, result: pixel weight, or 0 if KL does not count the pixel.
        spread: the same shape, result: share / C * label weight, or 0. Empty without label smoothing.
        counts: (B, H, 3) float64 result: sum of the class weights, pixels that KL counts, class ids out of range.
    """
    _, H, tiles, P, n = ids.shape
    C, W = class_weight.size, inside_x.shape[1]
    has_labels, has_pixel_weight = labels.shape[1] > 0, pixel_weight.shape[1] > 0
    has_label_weight, has_spread = label_weight.shape[1] > 0, spread.size > 0
    kept, part = _f(1 - share), _f(share / C)
    for task in range(first, last):
        b, y = task // H, task % H
        bt = b if inside_y.shape[0] > 1 else 0
        weight_sum, counted, wrong = 0.0, 0, 0
        for tile in range(tiles):
            for p in range(P):
                for k in range(n):
                    x = P * (tile * pitch + k) + p - offset
                    ids[b, y, tile, p, k] = 0
                    weight[b, y, tile, p, k] = 0
                    gate[b, y, tile, p, k] = 0
                    if has_spread:
                        spread[b, y, tile, p, k] = 0
                    if k >= pitch or x < 0 or x >= W:
                        continue
                    label = np.int64(labels[b, y, x]) if has_labels else np.int64(0)
                    void = has_labels and label == ignore_index
                    if use_ce and not void:
                        if label < 0 or label >= C:
                            wrong += 1
                        else:
                            ids[b, y, tile, p, k] = label
                            label_factor = label_weight[b, y, x] if has_label_weight else _f(1)
                            weight[b, y, tile, p, k] = class_weight[label] * kept * label_factor
                            weight_sum += class_weight[label]
                            if has_spread:
                                spread[b, y, tile, p, k] = part * label_factor
                    inside = inside_y[bt, y] and inside_x[bt, x]
                    if use_kl and inside and not (void and skip_void):
                        counted += 1
                        gate[b, y, tile, p, k] = pixel_weight[b, y, x] if has_pixel_weight else _f(1)
        counts[b, y, 0], counts[b, y, 1], counts[b, y, 2] = weight_sum, counted, wrong

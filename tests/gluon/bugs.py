"""Bugs to plant in the kernels of programs/: a name, the text in the source, the text in its place."""

from __future__ import annotations

# Asynchrony: phases, counts, bytes, waits, releases, fences, the end.
FORWARD = {
    "producer starts in phase 0": ("phase = slot + 1", "phase = slot"),
    "no expect for V": ("        mbarrier.expect(v_full.index(slot), BN * D * 2)\n", ""),
    "half the bytes of K expected": ("expect(k_full.index(slot), BN * D * 2)", "expect(k_full.index(slot), BN * D)"),
    "twice the bytes of V expected": ("expect(v_full.index(slot), BN * D * 2)", "expect(v_full.index(slot), BN * D * 4)"),
    "Q expects one tile": ("expect(q_full, 2 * BM * D * 2)", "expect(q_full, BM * D * 2)"),
    "V released before its product is over": (
        "    acc = warpgroup_mma_wait(0, [acc])\n    mbarrier.arrive(v_empty.index(old), count=1)\n    acc = acc",
        "    mbarrier.arrive(v_empty.index(old), count=1)\n    acc = warpgroup_mma_wait(0, [acc])\n    acc = acc",
    ),
    "output scaled under its product": (
        "    acc = warpgroup_mma_wait(0, [acc])\n    mbarrier.arrive(v_empty.index(old), count=1)\n    acc = acc",
        "    acc = warpgroup_mma_wait(1, [acc])\n    mbarrier.arrive(v_empty.index(old), count=1)\n    acc = acc",
    ),
    "scores read under their product": ("warpgroup_mma_wait(1, [s])", "warpgroup_mma_wait(2, [s])"),
    "K not waited for": (
        "    mbarrier.wait(k_full.index(slot), phase)\n    k = k_tiles.index(slot).reshape([BN, D])\n    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)\n    mbarrier",
        "    k = k_tiles.index(slot).reshape([BN, D])\n    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)\n    mbarrier",
    ),
    "V waited for in K's phase": (
        "    mbarrier.wait(v_full.index(old), old_phase)\n    acc = warpgroup_mma(p, v_tiles.index(old).reshape([BN, D]), acc, is_async=True)\n    s",
        "    mbarrier.wait(v_full.index(old), phase)\n    acc = warpgroup_mma(p, v_tiles.index(old).reshape([BN, D]), acc, is_async=True)\n    s",
    ),
    "K's slot waits for one consumer": ("init(k_empty.index(i), count=2)", "init(k_empty.index(i), count=1)"),
    "V's slot waits for three consumers": ("init(v_empty.index(i), count=2)", "init(v_empty.index(i), count=3)"),
    "V's slots have no barriers": ("        mbarrier.init(v_empty.index(i), count=2)\n", ""),
    "Q not waited for": ("    mbarrier.wait(q_full, 0)\n", ""),
    "Q waited for in phase 1": ("mbarrier.wait(q_full, 0)", "mbarrier.wait(q_full, 1)"),
    "phase never flips": ("        slot = slot * 0\n        phase ^= 1\n", "        slot = slot * 0\n"),
    "ring wraps one late": ("if slot == STAGES:", "if slot > STAGES:"),
    "V's slot not waited for": ("        mbarrier.wait(v_empty.index(slot), phase)\n", ""),
    "V loaded into slot 0": ("v_full.index(slot), v_tiles.index(slot))", "v_full.index(slot), v_tiles.index(0))"),
    "V's load signals K's barrier": ("h, 0], v_full.index(slot), v_tiles", "h, 0], k_full.index(slot), v_tiles"),
    "a tile too many is loaded": ("for i in range(tiles):", "for i in range(tiles + 1):"),
    "last product not waited for": (
        "    acc = warpgroup_mma_wait(0, [acc])\n    mbarrier.arrive(v_empty.index(old), count=1)\n    inverse",
        "    mbarrier.arrive(v_empty.index(old), count=1)\n    inverse",
    ),
    "K's slot released twice": (
        "    s = warpgroup_mma_wait(1, [s])\n    mbarrier.arrive(k_empty.index(slot), count=1)",
        "    s = warpgroup_mma_wait(1, [s])\n    mbarrier.arrive(k_empty.index(slot), count=2)",
    ),
    "no fence after the barriers' init": ("    fence_async_shared()\n    first", "    first"),
    "no fence before the output's store": ("    fence_async_shared()\n    tma.async_store", "    tma.async_store"),
    "output's store not waited for": ("    tma.store_wait(0)\n", ""),
    "output through the other's Q": ("    q.store(out", "    q_tiles.index(1 - WHICH).reshape([BM, D]).store(out"),
    "P in the scores' layout": ("    p = gl.convert_layout(weights.to(gl.bfloat16), P)\n    old = slot\n    old_phase = phase\n    slot, phase = ring(slot, phase, STAGES)\n    whole", "    p = gl.convert_layout(weights.to(gl.bfloat16), S)\n    old = slot\n    old_phase = phase\n    slot, phase = ring(slot, phase, STAGES)\n    whole"),
    # Arithmetic, masks, bounds.
    "output not scaled": ("    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, A))[:, None]\n", ""),
    "weights by the old maximum": (
        "    weights = gl.exp2(s * scale - new_top[:, None])\n    total = total * alpha",
        "    weights = gl.exp2(s * scale - top[:, None])\n    total = total * alpha",
    ),
    "sum not scaled": ("total = total * alpha + gl.sum(weights, 1)", "total = total + gl.sum(weights, 1)"),
    "rows of the first program everywhere": ("first = gl.program_id(0) * (2 * BM)", "first = gl.program_id(0) * 0"),
    "both consumers have the same rows": ("row = first + WHICH * BM", "row = first"),
    "keys beyond the last not masked": ("keep = columns[None, :] < sk", "keep = columns[None, :] < sk + BN"),
    "causal mask one off": ("rows[:, None] + (sk - sq))", "rows[:, None] + (sk - sq) + 1)"),
    "a tile that needs its mask goes without": ("if n + BN - 1 > last:", "if n + BN - 2 > last:"),
    "masked tiles end one early": ("edge = gl.minimum(gl.maximum(tiles - whole, 1), tiles)", "edge = gl.minimum(gl.maximum(tiles - whole - 1, 1), tiles)"),
    "causal keys end a tile early": ("first + 2 * BM + sk - sq)", "first + BM + sk - sq)"),
    "lse stored without mask": (", mask=rows < sq)", ")"),
    "wrong head of K and V": ("h // group", "h % group"),
    "rows without keys divide by zero": ("gl.where(total > 0, 1.0 / total, 0.0)", "1.0 / total"),
}  # fmt: skip

BACKWARD = {
    "dS stored under the last product of dQ": ("        mbarrier.wait(ds_empty, turn ^ 1)\n", ""),
    "the other's dS not waited for": ("        mbarrier.wait(ds_full, turn)\n", ""),
    "dS waits for one consumer": ("mbarrier.init(ds_full, count=2)", "mbarrier.init(ds_full, count=1)"),
    "no fence after the store of dS": ("        my_ds.store(ds)\n        fence_async_shared()\n", "        my_ds.store(ds)\n"),
    "fence before the store of dS": (
        "        my_ds.store(ds)\n        fence_async_shared()\n",
        "        fence_async_shared()\n        my_ds.store(ds)\n",
    ),
    "no fence before dQ is added": ("        fence_async_shared()\n        tma.async_atomic_add", "        tma.async_atomic_add"),
    "no fence after the barriers' init": ("    fence_async_shared()\n    first", "    first"),
    "dQ's tile overwritten under its addition": ("        tma.store_wait(0)\n        dq_tiles", "        dq_tiles"),
    "dQ's tile overwritten, one addition left": ("        tma.store_wait(0)\n        dq_tiles", "        tma.store_wait(1)\n        dq_tiles"),
    "end under the last addition": ("mask=rows[:, None] < sk)\n    tma.store_wait(0)\n", "mask=rows[:, None] < sk)\n"),
    "Q released before the product of dK is over": (
        "        dv_sum, dk_sum = warpgroup_mma_wait(1, [dv_sum, dk_sum])\n        mbarrier.arrive(do_empty.index(slot), count=1)\n        mbarrier.arrive(q_empty.index(slot), count=1)\n",
        "        mbarrier.arrive(q_empty.index(slot), count=1)\n        dv_sum, dk_sum = warpgroup_mma_wait(1, [dv_sum, dk_sum])\n        mbarrier.arrive(do_empty.index(slot), count=1)\n",
    ),
    "Q released with two products in flight": ("warpgroup_mma_wait(1, [dv_sum, dk_sum])", "warpgroup_mma_wait(2, [dv_sum, dk_sum])"),
    "dS released under the product of dQ": (
        "        dq_part = warpgroup_mma_wait(0, [dq_part])\n        mbarrier.arrive(ds_empty, count=1)\n",
        "        mbarrier.arrive(ds_empty, count=1)\n        dq_part = warpgroup_mma_wait(0, [dq_part])\n",
    ),
    "turn never flips": ("        turn ^= 1\n", ""),
    "dP read under its product": ("dp = warpgroup_mma_wait(0, [dp])", "dp = warpgroup_mma_wait(1, [dp])"),
    "K and V expect one tile": ("expect(kv_full, 2 * 128 * D * 2)", "expect(kv_full, 128 * D * 2)"),
    "K's width in 4 bytes": ("gl.DotOperandLayout(0, A, 2)", "gl.DotOperandLayout(0, A, 4)"),
    "Q not transposed": ("my_k, q_tiles.index(slot).permute((1, 0))", "my_k, q_tiles.index(slot)"),
    "dQ stored, not added": ("tma.async_atomic_add(dq_box", "tma.async_store(dq_box"),
    "both add the same half of dQ": ("(dq_box, [m, WHICH * (D // 2)]", "(dq_box, [m, 0]"),
    "keys beyond the last not masked": ("        if key + 64 > sk:\n            p = gl.where(keys[:, None] < sk, p, 0.0)\n", ""),
    "first tile of queries one late": ("// BM * BM, sq)", "// BM * BM + BM, sq)"),
    "dK without the scale": ("(dk_sum * scale)", "dk_sum"),
    "descriptor one key too long": ("tma.make_tensor_descriptor(v, [sk, D]", "tma.make_tensor_descriptor(v, [sk + 1, D]"),
}  # fmt: skip

# Of ops/attention/gluon/forward.py; the backward's are in tests/ops/attention.
PACKAGE_FORWARD = {
    "producer starts in phase 0": ("phase = slot + 1  # the ring begins empty", "phase = slot"),
    "V's slot not waited for": ("        mbarrier.wait(ring.v_empty.index(slot), phase)\n", ""),
    "half the bytes of V expected": ("kind.BN * kind.DV * 2)", "kind.BN * kind.DV)"),
    "Q expects one tile": ("expect(q_full, CONSUMERS * BM * D * 2)", "expect(q_full, BM * D * 2)"),
    "Q not waited for": ("    mbarrier.wait(q_full, 0)\n", ""),
    "K's slot waits for one consumer": ("init(k_empty.index(i), count=CONSUMERS)", "init(k_empty.index(i), count=1)"),
    "the first turn is nobody's": ("FIRST: gl.constexpr = 1 if WHICH == 0 else 0", "FIRST: gl.constexpr = 0"),
    "a turn waits for two consumers": ("init(turn.index(i), count=1)", "init(turn.index(i), count=2)"),
    "values read before all are clean": ("    mbarrier.wait(ring.clean, 0)\n", ""),
    "phase never flips": ("        phase ^= 1\n", ""),
    "scores read under their product": ("warpgroup_mma_wait(1, [s])", "warpgroup_mma_wait(2, [s])"),
    "no fence after the barriers' init": ("    fence_async_shared()  # before the copies see the barriers\n", ""),
    "no fence before the output's store": ("        fence_async_shared()\n        tma.async_store", "        tma.async_store"),
    "output's store not waited for": ("    tma.store_wait(0)\n", ""),
    "lse stored beyond its rows": ("mask=rows < results.queries", "mask=rows <= results.queries"),
    "keys beyond the last not masked": ("end = rule.keys\n", "end = rule.keys + 1\n"),
    "left edge one off": ("columns >= (rows", "columns > (rows"),
    "right edge one off": ("rows + rule.high + 1, end", "rows + rule.high, end"),
    "masked tiles end one early": ("gl.maximum(end - whole, 1)", "gl.maximum(end - whole - 1, 1)"),
    "sink not scaled": ("total * alpha + gl.sum(e, 1)\n    top", "total + gl.sum(e, 1)\n    top"),
    "wrong head of K and V": ("head // group", "head % group"),
    "output not scaled before the last product": (
        "    if kind.EARLY:\n        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]\n    v = ring",
        "    v = ring",
    ),
}  # fmt: skip

# Of ops/common/gluon_products.py.
PRODUCTS = {
    "producer starts in phase 0": ("phase = slot + 1  # the ring begins empty", "phase = slot"),
    "slot not waited for": ("        mbarrier.wait(ring.empty.index(slot), phase)\n", ""),
    "slot waits for two consumers": ("init(empty.index(i), count=CONSUMERS)", "init(empty.index(i), count=2)"),
    "operands not waited for": ("        mbarrier.wait(ring.full.index(slot), phase)\n", ""),
    "bytes of one right operand expected": ("* ROWS + 2 * HALF)", "* ROWS + HALF)"),
    "phase never flips": ("        phase ^= 1\n", ""),
    "slot released under its products": ("warpgroup_mma_wait(0, [first, second])", "warpgroup_mma_wait(1, [first, second])"),
    "all consumers have the first rows": ("turned(ring.left.index(slot * CONSUMERS + WHICH)", "turned(ring.left.index(slot * CONSUMERS)"),
    "no fence after the barriers' init": ("    fence_async_shared()  # before the copies see the barriers\n", ""),
    "no fence before a result's store": ("    fence_async_shared()  # before the copy reads it\n", ""),
    "a result overwrites the last one": ("    tma.store_wait(0)  # the last one has left\n", ""),
    "the last store not waited for": ("mine)\n    tma.store_wait(0)\n", "mine)\n"),
    "bias read beyond its end": ("mask=columns < width", "mask=columns <= width"),
    "second half has the first half's columns": ("        second += HALF\n", "        second += 0\n"),
    "second half stored over the first": ("        column += HALF\n        put", "        put"),
    "last group of rows as high as the others": ("height = gl.minimum(walk.rows - group * GROUP, GROUP)", "height = GROUP"),
    "walk repeats the first tiles": ("gl.num_programs(0)):\n        row, column = corner(tile, walk, kind)\n        row +=", "gl.num_programs(0) + 1):\n        row, column = corner(tile, walk, kind)\n        row +="),
    "added terms not multiplied": ("trips += walk.more", "trips += 0"),
    "added terms of the first operands": ("fill(more, walk.more,", "fill(operands, walk.more,"),
    "left operand not turned": ("WHICH), not kind.LEFT)", "WHICH), kind.LEFT)"),
}  # fmt: skip
# Of ops/ffn/gluon/forward.py.
PACKAGE_FFN = {
    "second half has the first half's bias": ("        column += HALF\n", "        column += 0\n"),
    "gate without its bias": ("results.gate_bias, column, width, do.GATE_BIASED", "results.bias, column, width, False"),
    "activation of the wrong one": ("put_hidden(gate_pre, pre,", "put_hidden(pre, gate_pre,"),
    "the last store not waited for": ("mine, do)\n    tma.store_wait(0)\n", "mine, do)\n"),
    "pre of the gate stored over the other": ("put(gate_pre, results.gate_pre,", "put(gate_pre, results.pre,"),
    "rows of the first consumer": ("row + WHICH * ROWS", "row"),
}  # fmt: skip
# Of ops/ffn/gluon/backward.py.
PACKAGE_FFN_BACKWARD = {
    "pre not waited for": ("    mbarrier.wait(tiles.ready.index(tiles.FIRST + WHICH), PARITY)\n", ""),
    "pre over a result that has not left": ("    tma.store_wait(0)\n    mbarrier.expect", "    mbarrier.expect"),
    "bytes of half a strip expected": ("= 2 * ROWS * STRIP", "= ROWS * STRIP"),
    "parity of a gated strip never flips": ("fetched(tiles, 0, PLACE % 2)", "fetched(tiles, 0, 0)"),
    "parity of a strip flips too often": ("fetched(tiles, MINE, PLACE // 2)", "fetched(tiles, MINE, MINE)"),
    "next strip's columns are this one's": ("column + 2 * STRIP, tiles, MINE", "column, tiles, MINE"),
    "rows that are not there in the sums": ("gl.where((rows < results.tokens)[:, None], value, 0.0)", "gl.where((rows < results.tokens)[:, None], value, 1.0)"),
    "sums beyond the last column": ("mask=columns < results.width", "mask=columns <= results.width"),
    "all consumers share the first tiles": ("Tiles(smem, ready, 2 * WHICH)", "Tiles(smem, ready, 0)"),
    "strips change places": ("left, right = gl.split", "right, left = gl.split"),
    "the last store not waited for": ("do, 3)\n    tma.store_wait(0)\n", "do, 3)\n"),
    "barriers initialised after the fence": ("    for i in gl.static_range(2 * CONSUMERS):\n        mbarrier.init(ready.index(i), count=1)\n    ring = make_ring(operands)  # whose fence is after these barriers too\n", "    ring = make_ring(operands)  # whose fence is after these barriers too\n    for i in gl.static_range(2 * CONSUMERS):\n        mbarrier.init(ready.index(i), count=1)\n"),
    "derivative of the other matrix": ("(dhidden * pre * derivative)", "(dhidden * gate_pre * derivative)"),
}  # fmt: skip

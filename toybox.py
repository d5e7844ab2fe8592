"""The toybox: six things that sound, drawn and synthesised from a seed, and how a video of them is read back."""
import numpy as np

FPS, RATE, FRAMES = 24, 16000, 49                            # 49 frames = 1 + 48 make 13 latents of 4 frames
KINDS = ("ball", "hammer", "mouth", "lamp", "roller", "bell")
STATES = {"ball": (0, 1), "hammer": (-.6, 1), "mouth": (0, 1), "lamp": (0, 1), "roller": (0, 1), "bell": (-1, 1)}
# kind: (first event not before, shortest gap between events), seconds
TIMING = {"ball": (.40, .36), "hammer": (.44, .44), "mouth": (.34, .16), "lamp": (.34, .22), "roller": (.80, .85), "bell": (.44, .36)}


# ------------------------------------------------------------------------------------------------ toybox: what is there

def sample_scene(rng, kind=None):
    """Draw a thing, its place, colours and material. Knows nothing of events. Lengths are shares of the picture's side."""
    kind = kind or KINDS[rng.integers(len(KINDS))]
    back = rng.uniform(0, 1, (2, 3)) * rng.uniform(.25, 1)                    # top and bottom colour of the background
    colours = []
    while len(colours) < 3:                                                   # things must stand out from their ground
        c = rng.uniform(0, 1, 3)
        if np.linalg.norm(c - back, axis=1).min() > .5 and all(np.linalg.norm(c - o) > .35 for o in colours):
            colours.append(c)
        elif rng.random() < .02:                                              # a mid-grey ground leaves no room: redraw it
            back, colours = rng.uniform(0, 1, (2, 3)) * rng.uniform(.25, 1), []
    material = dict(pitch=np.exp(rng.uniform(np.log(110), np.log(2800))), ratios=np.cumsum(rng.uniform(.45, 1.6, 4)),
                    levels=rng.uniform(.1, 1, 4) * (.1 if rng.random() < .25 else 1), ring=np.exp(rng.uniform(np.log(.015), np.log(.5))),
                    noise=rng.uniform(.1, 1.5), burst=np.exp(rng.uniform(np.log(.003), np.log(.09))),
                    thud=rng.uniform(0, 1.2) * (rng.random() < .4), drop=rng.uniform(0, .6) * (rng.random() < .3),
                    voice=np.exp(rng.uniform(np.log(75), np.log(800))), breath=rng.uniform(0, .6) ** 2, rough=rng.uniform(0, .3) ** 2,
                    formants=np.exp(rng.uniform(np.log([250, 600, 1800]), np.log([1000, 2500, 4500]))), vibrato=rng.uniform(0, .04))
    return dict(kind=kind, back=back, colours=np.array(colours), x=rng.uniform(-.12, .12), y=rng.uniform(-.05, .05),
                scale=rng.uniform(.85, 1.12), size=rng.uniform(0, 1), flip=bool(rng.random() < .5), material=material)


def sample_events(kind, seconds, rng):
    """Irregular event times and durations (n,), (n,): up to 6, never at once, none so late that its motion is cut."""
    first, gap = TIMING[kind]
    spread, most = rng.uniform(.05, .7), rng.integers(1, 7) if seconds < 3 else int(3 * seconds)
    t, times, durations = first + rng.exponential(spread), [], []
    while t < seconds - .12 and len(times) < most:
        d = float(np.clip(rng.exponential(.3), .1, .9)) if kind == "mouth" else 0.
        times.append(t), durations.append(d)
        t += d + gap + rng.exponential(spread)
    return np.array(times), np.array(durations)


def state_curve(kind, events, durations, t):
    """The state s at times t (F,): 0 at rest, contacts are sharp peaks of height 1."""
    t, s = np.asarray(t, float), np.zeros(len(t))
    for k, (e, d) in enumerate(zip(events, durations)):
        u = t - e                                                             # seconds since this event
        if kind == "ball":                                                    # free fall and bounce: two half parabolas
            s = np.maximum(s, np.clip(1 - np.abs(u) / .19, 0, 1) ** 2)
        elif kind == "hammer":                                                # lift, wait, strike, return
            swing = np.interp(u, [-.42, -.22, -.12, 0, .06, .24], [0, -.55, -.55, 1, .8, 0])
            s = np.where(np.abs(swing) > np.abs(s), swing, s)
        elif kind == "mouth":
            s = np.maximum(s, np.interp(u, [-.03, .03, max(d, .04), max(d, .04) + .08], [0, 1, 1, 0]))
        elif kind == "lamp":                                                  # full light for the first frame it can be seen in
            s = np.maximum(s, np.where(u >= -.5 / FPS, np.exp(-np.maximum(u, 0) / .11), 0))
        elif kind == "roller":
            s = np.maximum(s, np.interp(u, [-.78, 0, .45], [0, 1, 0]))
        elif kind == "bell":                                                  # half a cosine between turning points
            side, before = (-1) ** k, events[k - 1] if k else -9.
            after = events[k + 1] if k + 1 < len(events) else 99.
            s = s + _half_swing(u, -(e - before) / 2 if e - before < .9 else -.42, side)
            s = s + _half_swing(-u, -(after - e) / 2 if after - e < .9 else -.42, side) * (u > 0)
    return s


def _half_swing(u, start, side):
    """Half of a swing: 0 at u = start, `side` at its turning point u = 0, as a quarter of a sine."""
    start = min(start, -1e-3)                                                 # a reader may try two events at once
    return side * np.sin(np.pi / 2 * np.clip((u - start) / -start, 0, 1)) * ((u > start) & (u <= 0))


# ------------------------------------------------------------------------------------------------ toybox: the picture

def _disc(x, y, cx, cy, r):                                                   # signed distances, negative inside
    return np.sqrt((x - cx) ** 2 + (y - cy) ** 2) - r


def _box(x, y, cx, cy, w, h):                                                 # half width w, half height h
    return np.maximum(np.abs(x - cx) - w, np.abs(y - cy) - h)


def draw_scene(scene, s, size=64):
    """Draw a scene in the states s (F,) -> uint8 (F, size, size, 3). Anti-aliased: coverage from a signed distance."""
    s = np.asarray(s, np.float32).reshape(-1, 1, 1)                           # (F, 1, 1)
    p = (np.arange(size, dtype=np.float32) + .5) / size                       # pixel centres
    ramp = p[:, None, None]                                                   # (H, 1, 1)
    picture = np.broadcast_to((1 - ramp) * scene["back"][0] + ramp * scene["back"][1], (size, size, 3))
    x, y = np.meshgrid(p, p)                                                  # (H, W) each
    x = ((1 - x if scene["flip"] else x) - .5 - scene["x"]) / scene["scale"] + .5
    y = (y - .5 - scene["y"]) / scene["scale"] + .5
    sharp = size * scene["scale"]                                             # pixels per unit: the edge is one pixel wide

    def cover(distance):
        return np.clip(.5 - distance * sharp, 0, 1).astype(np.float32)        # (F or 1, H, W) in [0, 1]

    for mask, colour in _layers(scene, s, x[None].astype(np.float32), y[None].astype(np.float32), cover):
        moves = len(mask) > 1
        rows = np.flatnonzero(mask.max((0, 2)) > 0) if moves else np.arange(size)
        if len(rows) == 0:
            continue
        if moves and picture.ndim == 3:
            picture = np.broadcast_to(picture, (len(s), size, size, 3)).astype(np.float32)
        band, m = slice(rows[0], rows[-1] + 1), mask[..., None]               # blend only the rows that the mask touches
        if picture.ndim == 3:
            picture = picture + m[0] * (colour - picture)
        else:
            picture[:, band] += m[:, band] * (np.asarray(colour, np.float32) - picture[:, band])
    picture = np.broadcast_to(picture, (len(s), size, size, 3))
    return (np.clip(picture, 0, 1) * 255 + .5).astype(np.uint8)


def _layers(scene, s, x, y, cover):
    """The things of a scene from back to front: (mask, colour). x, y (1, H, W); s (F, 1, 1); moving masks (F, H, W)."""
    kind, (a, b, c), big = scene["kind"], scene["colours"], scene["size"]     # three colours; big in 0..1
    if kind == "ball":
        r = .13 + .05 * big
        floor, top = .86, .12 + r
        yield cover(floor - y), b                                             # floor
        yield cover(_box(x, y, .5, .06, .10, .04)), c                         # the holder it hangs from
        yield cover(_disc(x, y, .5, top + s * (floor - r - top), r)), a
    elif kind == "hammer":
        arm, head = .50, .12 + .04 * big
        angle = .75 * (1 - s)                                                 # level at the strike, s = 1
        u, v = x - .82, y - .60                                               # pivot right of the middle
        along, across = -u * np.cos(angle) - v * np.sin(angle), -u * np.sin(angle) + v * np.cos(angle)
        yield cover(_box(x, y, .82 - arm, .60 + head + .13, .20, .13)), c     # the block
        yield cover(_box(along, across, arm / 2, 0, arm / 2, .035)), b        # handle
        yield cover(_box(along, across, arm, 0, .10, head)), a                # head: touches the block at s = 1
    elif kind == "mouth":
        w, h = .19 + .05 * big, .02 + .17 * np.clip(s, 0, 1.2)
        yield cover(_disc(x, y, .5, .5, .40)), a
        for side in (-1, 1):
            yield cover(_disc(x, y, .5 + side * .15, .33, .055)), b
        ellipse = np.sqrt(((x - .5) / w) ** 2 + ((y - .64) / h) ** 2)
        yield cover((ellipse - 1) * np.minimum(w, h)), c
    elif kind == "lamp":
        r, glow = .15 + .05 * big, np.clip(s, 0, 1.2)
        light = np.array([1, .97, .8])
        yield cover(_box(x, y, .5, .80, .035, .20)), b                        # pole
        yield .75 * glow * np.exp(-np.maximum(_disc(x, y, .5, .42, r), 0) / .16).astype(np.float32), light
        yield cover(_disc(x, y, .5, .42, r)), .35 * a                         # the bulb, dark ...
        yield glow * cover(_disc(x, y, .5, .42, r)), light                    # ... and lit
    elif kind == "roller":
        r, foot = .12 + .04 * big, .82
        lean = .5 * np.clip((s - .93) / .07, 0, 1)                            # the pin leans while it is touched
        u, v = x - .86, y - foot
        yield cover(foot - y), b
        yield cover(_box(u * np.cos(lean) + v * np.sin(lean), v * np.cos(lean) - u * np.sin(lean), 0, -.21, .055, .21)), c
        yield cover(_disc(x, y, .12 + s * (.805 - r - .12), foot - r, r)), a
    elif kind == "bell":
        # its picture is symmetric: mirrored or not it swings to the same side first, or nothing could tell where to
        r, angle = .15 + .04 * big, .72 * (-s if scene["flip"] else s)
        u, v = x - .5, y - .14
        side, down = u * np.cos(angle) - v * np.sin(angle), u * np.sin(angle) + v * np.cos(angle)
        yield cover(_box(x, y, .5, .10, .26, .045)), b                        # beam
        yield cover(_box(side, down, 0, .16, .022, .16)), c                   # rope
        yield cover(np.minimum(_disc(side, down, 0, .40, r), _box(side, down, 0, .50, r * 1.25, .06))), a


# ------------------------------------------------------------------------------------------------ toybox: the sound

def _strike(m, rng):
    """One hit on a material: ringing modes, a burst of noise, sometimes a thud or a falling pitch. float32 (samples,)"""
    t = np.arange(int(RATE * min(.9, 6 * max(m["ring"], m["burst"]) + .03)), dtype=np.float32) / RATE
    fall = 1 - m["drop"] * (1 - np.exp(-t / .04))
    out = m["noise"] * rng.standard_normal(len(t), dtype=np.float32) * np.exp(-t / m["burst"])
    for ratio, level, k in zip(m["ratios"], m["levels"], range(9)):
        f = m["pitch"] * ratio
        if f < RATE / 2.2:
            out += level * np.sin(2 * np.pi * f * fall * t) * np.exp(-t * (1 + k) / m["ring"])
    out += 1.5 * m["thud"] * np.sin(2 * np.pi * 70 * t) * np.exp(-t / .05)
    return out * np.minimum(1, np.arange(len(t)) / 12 + .2) / (np.abs(out).max() + 1e-6)


def _voice(m, duration, rng):
    """A tone held for `duration` seconds: a buzz of unsteady pitch and breath, shaped by formants; another vowel each time. -> float32
    (samples,), the vowel's letter"""
    n = int(RATE * (duration + .07))
    t = np.arange(n, dtype=np.float32) / RATE
    knots = np.arange(0, duration + .2, .03)                                  # the pitch wanders from one to the next
    wander = np.interp(t, knots, rng.normal(0, 1, len(knots)))
    f0 = m["voice"] * np.exp(rng.normal(0, .15)) * (1 + rng.uniform(-.25, .25) * t / duration + m["rough"] * wander
                                                    + m["vibrato"] * np.sin(2 * np.pi * 5.5 * t))
    buzz = 1 - 2 * (np.cumsum(f0) / RATE % 1)                                 # a sawtooth: every harmonic, the k-th at 1/k
    spectrum = np.fft.rfft(buzz + m["breath"] * rng.standard_normal(n), 1 << n.bit_length())
    f = np.fft.rfftfreq(1 << n.bit_length(), 1 / RATE) + 1
    formants = m["formants"] * np.exp(rng.normal(0, .25, len(m["formants"])))
    spectrum *= .1 + sum(np.exp(-(np.log(f / g) / .3) ** 2) for g in formants)
    out = np.fft.irfft(spectrum)[:n]
    envelope = np.interp(t, [0, rng.uniform(.005, .05), duration, duration + .06], [0, 1, rng.uniform(.4, 1), 0])
    low, high = formants[:2] > m["formants"][:2]                              # where the first two formants went is a vowel
    return (out * envelope / (np.abs(out).max() + 1e-6)).astype(np.float32), "uioa"[2 * int(low) + int(high)]


def _off_screen(n, rng):
    """A sound that nothing in the picture makes: a hum, a slow sweep or babble. All fade in over 0.3 s or more."""
    t = np.arange(n, dtype=np.float32) / RATE
    what = rng.integers(3)
    if what == 0:
        f = rng.uniform(50, 220)
        out = sum(rng.uniform(.1, 1) * np.sin(2 * np.pi * f * k * t) for k in range(1, 5))
    elif what == 1:
        f = rng.uniform(300, 3000) * np.exp(rng.uniform(-.8, .8) * t)
        out = np.sin(2 * np.pi * np.cumsum(f) / RATE)
    else:
        out = np.convolve(rng.standard_normal(n), np.hanning(int(rng.uniform(4, 30))), "same")
        out *= .65 + .35 * np.sin(2 * np.pi * rng.uniform(1, 2.5) * t + rng.uniform(0, 6))
    start, fade = rng.uniform(-.6, .5 * t[-1]), rng.uniform(.3, .8)
    out = out * np.clip((t - start) / fade, 0, 1) ** 2
    return (out / (np.abs(out).max() + 1e-6)).astype(np.float32)


def synthesise(scene, events, durations, seconds, seed, off_screen=False, said=None):
    """The waveform of a clip, float32 (seconds x 16 000,): events, then room, tilt, noise floor and gain.

    Every event and the room draw by themselves: other events with the same seed are recorded in the same room. said: a list that
    gets the vowels of a mouth."""
    n, m = round(seconds * RATE), scene["material"]
    out = np.zeros(n, np.float32)
    if scene["kind"] == "bell":
        m = dict(m, ring=.15 + m["ring"], noise=.3 * m["noise"])
    hit = _strike(m, np.random.default_rng([seed, 1618]))
    for k, (e, d) in enumerate(zip(events, durations)):
        rng = np.random.default_rng([seed, 1618, 1 + k])
        sound, vowel = _voice(m, d, rng) if scene["kind"] == "mouth" else (hit, "")
        if said is not None:
            said += vowel
        a = round(e * RATE)
        piece = sound[:max(0, n - a)]
        out[a:a + len(piece)] += piece * 10 ** rng.uniform(-.4, 0)            # up to 8 dB between two hits
    room = np.random.default_rng([seed, 1414])
    if off_screen:
        out += _off_screen(n, room) * room.uniform(.03, .5 if len(events) == 0 else .12)
    padded = 1 << (n + RATE // 2).bit_length()                                # a power of two, longer than clip plus echo
    out = np.fft.rfft(out, padded)
    f = np.maximum(np.fft.rfftfreq(padded, 1 / RATE), 60)
    out *= (f / 800) ** room.uniform(-.7, .5)                                 # recordings are dull or bright
    if room.random() < .5:                                                    # a room: decaying noise, well below the sound
        t = np.arange(int(RATE * .5)) / RATE
        echo = room.standard_normal(len(t)) * np.exp(-t / room.uniform(.02, .14)) * 10 ** room.uniform(-2.2, -1.3)
        echo[0] = 1
        out *= np.fft.rfft(echo, padded)
    out = np.fft.irfft(out, padded)[:n]
    floor = np.cumsum(room.standard_normal(n)) * .02 if room.random() < .3 else room.standard_normal(n)
    floor -= floor.mean()
    loud = np.abs(out).max() if len(events) or off_screen else 1.
    out = out / (loud + 1e-9) + floor / (floor.std() + 1e-9) * 10 ** room.uniform(-4, -1.4)
    return np.clip(out * 10 ** room.uniform(-1.2, -.05), -1, 1).astype(np.float32)


# ------------------------------------------------------------------------------------------------ toybox: whole clips

_WORDS = {
    "ball": (["a ball", "a heavy ball", "something round"], ["drops onto the floor", "falls and bounces", "hits the ground"]),
    "hammer": (["a hammer", "a mallet", "somebody's hammer"], ["strikes a block", "winds up and strikes", "pounds the block"]),
    "mouth": (["a face", "a mouth", "a singer"], ["sings a tone", "opens as long as the voice lasts", "calls out"]),
    "lamp": (["a lamp", "a light", "a bulb"], ["flashes and fades", "lights up", "blinks"]),
    "roller": (["a slow ball", "a rolling ball", "a bowling ball"], ["rolls into a pin", "bumps a pin", "rolls and knocks"]),
    "bell": (["a bell", "a hanging bell", "a church bell"], ["swings and rings", "rings where it turns", "tolls"]),
}
_TIMES = ("", "once", "twice", "three times", "four times", "five times", "six times")


def sample_caption(kind, n, off_screen, rng):
    """One sentence about a clip. About every third one counts the events."""
    things, does = _WORDS[kind]
    thing = things[rng.integers(len(things))]
    if n == 0:
        return f"{thing} {('rests', 'does not move', 'keeps still')[rng.integers(3)]}" + (", a sound comes from elsewhere" if off_screen else "")
    count = f" {_TIMES[n]}" if n < len(_TIMES) and rng.random() < .35 else ""
    return f"{thing} {does[rng.integers(len(does))]}{count}"


def toybox_clip(seed, size=64, frames=FRAMES, kind=None, video=True, variation=0):
    """One clip of the toybox, a pure function of its arguments. Other takes are of the same thing, but other things happen to it, in
    another room: same material, same colours.

    -> dict: video uint8 (F, size, size, 3) (absent if `video` is false), audio float32 (F / 24 x 16 000,), caption str, speech str
    (what a mouth says, a letter per event), seed, kind str, scene dict, state float (F,), events (n,) and durations (n,) in
    seconds. `size`: a multiple of 16."""
    rng = np.random.default_rng([seed, 2718])
    scene = sample_scene(rng, kind)
    if variation:
        rng = np.random.default_rng([seed, 2718, variation])
    seconds, mood, said = frames / FPS, rng.random(), []                      # 8 % silent, 10 % only off-screen sound
    events, durations = sample_events(scene["kind"], seconds, rng) if mood > .18 else (np.zeros(0), np.zeros(0))
    off_screen = bool(.08 <= mood < .18 or rng.random() < .2 * (mood > .18))
    state = state_curve(scene["kind"], events, durations, np.arange(frames) / FPS)
    audio = synthesise(scene, events, durations, seconds, seed + (variation << 40), off_screen, said)
    clip = dict(seed=seed, speech=" ".join(said), kind=scene["kind"], scene=scene, state=state, events=events, durations=durations, audio=audio,
                off_screen=off_screen, caption=sample_caption(scene["kind"], len(events), off_screen, rng))
    return dict(clip, video=draw_scene(scene, state, size)) if video else clip


def vae_training_pair(seed, size=64, blocks=4, t=4):
    """What a VAE with kernel_t = 1 trains on: frame 0 and `blocks` stretches of t frames, mostly ones in which something
    moves, twice: done by two things of one kind -> uint8 (2, 1 + blocks·t, size, size, 3). A whole clip would cost four
    times as much to draw and mostly stand still."""
    rng = np.random.default_rng([seed, 3141])
    scene = sample_scene(rng)
    events, durations = sample_events(scene["kind"], FRAMES / FPS, rng)
    state = state_curve(scene["kind"], events, durations, np.arange(FRAMES) / FPS)
    rows = state[1:].reshape(-1, t)                                           # (L - 1, t)
    odds = .1 + (np.abs(rows).max(1) > .05)
    chosen = rng.choice(len(rows), blocks, replace=False, p=odds / odds.sum())
    other = sample_scene(rng, scene["kind"])
    state = np.concatenate([state[:1], rows[chosen].ravel()])
    return np.stack([draw_scene(s, state, size) for s in (scene, other)])


# ------------------------------------------------------------------------------------------------ the reader

def track_states(video, scene):
    """Analysis by synthesis: video uint8 (F, H, W, 3) of a known scene -> states (F,), residuals (F,)."""
    low, high = STATES[scene["kind"]]
    grid = np.linspace(low, high, 61)                                         # (S,)
    drawn = draw_scene(scene, grid, video.shape[1]).reshape(len(grid), -1).astype(np.float32)
    seen = video.reshape(len(video), -1).astype(np.float32)                   # (F, pixels)
    error = (seen ** 2).sum(1)[:, None] - 2 * seen @ drawn.T + (drawn ** 2).sum(1)[None]             # (F, S)
    best = error.argmin(1)
    spanned = ((drawn - drawn.mean(0)) ** 2).sum(1).mean()
    return grid[best], error[np.arange(len(video)), best].clip(0) / spanned


def detect_events(kind, s, sure=None, fps=FPS):
    """State curve (F,) -> event times. Openings and flashes are risings through 0.5, all else are peaks.

    sure (F,), booleans: which frames could be read. An event is left out unless every frame that tells of it could."""
    found = []                                                                # (when, first and last frame that say so)
    if kind in ("mouth", "lamp"):
        up = False
        for f in range(1, len(s)):
            if not up and s[f] >= .5:
                up = True                       # a lamp is lit at once; a mouth was at 0.5 somewhere between two frames
                found.append((f if kind == "lamp" or s[f - 1] >= .5 else f - (s[f] - .5) / (s[f] - s[f - 1]), f - 1, f))
            up = up and s[f] > .35
    else:
        height, f = np.abs(s) if kind == "bell" else s, 0
        while f < len(s):
            if height[f] < .6:
                f += 1
                continue
            end = f                             # one stretch above 0.6 (on one side) is one event, at its top
            while end + 1 < len(s) and height[end + 1] >= .6 and (s[end + 1] > 0) == (s[f] > 0):
                end += 1
            top = np.flatnonzero(height[f:end + 1] >= height[f:end + 1].max() - .02).mean() + f
            if end + 1 < len(s) or height[end] < height[f:end + 1].max():     # cut off by the end while still rising: none
                found.append((top, max(f - 1, 0), end + 1))
            f = end + 1
        found = [(_between_frames(kind, s, [t for t, *_ in found], i), a, b) for i, (_, a, b) in enumerate(found)]
    return np.array([t for t, a, b in found if sure is None or sure[a:b + 1].all()]) / fps


def _between_frames(kind, s, tops, i):
    """The moment within a frame of tops[i] (all in frames) at which an event explains the states around it best: again
    analysis by synthesis. A hammer falls fast and rises slowly, so its highest frame mostly comes after its strike."""
    near = np.arange(max(0, round(tops[i]) - 3), min(len(s), round(tops[i]) + 4))
    size = np.abs if kind == "bell" else np.asarray                           # a bell rings on either side
    tries = tops[i] + np.arange(-10, 11) / 10
    misfit = [np.square(size(state_curve(kind, np.array([*tops[:i], t, *tops[i + 1:]]) / FPS, np.zeros(len(tops)), near / FPS)) - size(s[near])).sum()
              for t in tries]
    return tries[int(np.argmin(misfit))]


def detect_clip_events(video, clip):
    """-> event times of a video of a clip's scene, the residuals of its moving frames, the share of frames that could be read.

    Generated frames that can be recognised have residuals under 0.4, frames of something else over 1.3. At 1 a frame is as
    far from every drawing as the mean of all drawings is: nothing is read from such a frame, right or wrong."""
    s, residual = track_states(video, clip["scene"])
    return detect_events(clip["kind"], s, residual < 1), residual[np.abs(s) > .15], float((residual < 1).mean())


def fit_scene(frame, kind, tries=150, rounds=120, seed=0):
    """What a generated video shows, of which only the kind of thing is known: the scene whose drawing at rest is closest to its
    first frame, uint8 (H, W, 3) -> scene. A drawing is linear in its five colours, so for a place, a scale and a size the best
    colours are a least-squares solution; these four and the mirror image are searched at random, then nearer and nearer. On
    48 true clips, events read by fitted scenes have F1 1.000 at 50 ms and residual .03."""
    rng, size, pixels = np.random.default_rng(seed), len(frame), frame.reshape(-1, 3) / 255.
    low, high, one = np.array([-.12, -.05, .85, 0.]), np.array([.12, .05, 1.12, 1.]), np.eye(3)

    def attempt(p, flip):
        scene = dict(kind=kind, x=p[0], y=p[1], scale=p[2], size=p[3], flip=flip)
        back = draw_scene(dict(scene, back=one[:2], colours=np.zeros((3, 3))), [0.], size)[0, ..., :2]
        maps = np.concatenate([back, draw_scene(dict(scene, back=np.zeros((2, 3)), colours=one), [0.], size)[0]], -1).reshape(-1, 5) / 255.
        colours = np.linalg.solve(maps.T @ maps + 1e-4 * np.eye(5), maps.T @ pixels).clip(0, 1)   # (5, 3)
        return ((maps @ colours - pixels) ** 2).sum(), p, dict(scene, back=colours[:2], colours=colours[2:])
    best = min((attempt(rng.uniform(low, high), bool(i % 2)) for i in range(tries)), key=lambda t: t[0])
    for i in range(rounds):
        step = (high - low) / 4 * .97 ** i * rng.normal(size=4) * (rng.random(4) < .6)
        best = min(best, attempt((best[1] + step).clip(low, high), best[2]["flip"]), key=lambda t: t[0])
    return best[2]

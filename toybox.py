r"""The toybox: six things that make a sound, drawn and synthesised from a seed, and the reader that
finds the events in a video of them.

Real clips that move with their sound are gigabytes, and nobody can log exactly when something in
them happens. Of a toybox clip every event is known, so synchronisation can be measured exactly.

    seed          -> sample_scene, sample_events              -> scene, events
    scene, events -> state_curve -> s(t) -> draw_scene        -> video
    scene, events -> synthesise  -> record                    -> waveform
    scene, video  -> track_states -> s(t) -> detect_events    -> event times

Everything that moves is a function of ONE number per frame, the state s(t): 0 at rest, 1 at the
event. So a video of a known scene can be read back by analysis by synthesis: draw the scene in 61
states and take the closest for every frame; nothing in it is learned. Scenes are drawn before and
independently of events, and clips start at rest: the first frame does not show WHEN things happen.

Audio-motion relations like those that Syncphony discusses (appendix A); lamp and bell are ours:

    ball     drops onto a floor                   sound at the instant of contact
    hammer   winds up, then strikes               motion that announces the sound
    mouth    stays open while a tone lasts        motion as long as the sound
    lamp     flashes, then fades                  light that outlives the sound
    roller   a slow ball rolls into a pin         long motion before a short, sharp sound
    bell     swings and rings where it turns      the sound is where motion is slowest

s(t) of one event; | is its sound, numbers are seconds from it (not to scale):

    1        |                        |                     _____________
            /|\                       |`-.                 /|            \
    0  ____/ | \____        ___      /|   `-.___       ___/ |             \___
          -.19  .19        -.42 \___/ |     .24         -.03 .03        d  d+.08
           ball                    hammer (to -.55)         mouth, open for d seconds

    1        |                        |                         |
             |`.                  _.-'|`-.                   .-'|'-.
    0  ______|  `-._____      _.-'    |   `-.___       _____/   |   \_____
             0    time .11   -.78           .45           -.42     .42
            lamp                   roller                bell; the next event goes to -1

To see and hear clip 0 (out/clip.mp4):

    python -c "import data, toybox; c = toybox.toybox_clip(0, 256); \
               data.write_video('out/clip.mp4', c['video'], c['audio'])"

    F frames · H W height, width · n events · u seconds since an event · times in seconds
    video uint8 (F, H, W, 3) · waveform float32 (samples,) in [-1, 1], mono
    lengths in a picture are shares of its side; x to the right, y downwards
"""
import numpy as np

FPS = 24         # frames per second: what Pyramid Flow was trained at and Syncphony generates
RATE = 16000     # samples per second: what HuBERT and the log-mels here take
FRAMES = 49      # 2.04 s: 1 + 12 x 4 frames, 13 latents of a causal VAE with temporal stride 4
HELD_OUT = 10 ** 9                # seeds of clips to evaluate on start here; no training draws them

KINDS = ("ball", "hammer", "mouth", "lamp", "roller", "bell")

# Lowest and highest state. A hammer is negative while it winds up, a bell swings to either side.
STATES = dict(ball=(0, 1), hammer=(-.6, 1), mouth=(0, 1), lamp=(0, 1), roller=(0, 1), bell=(-1, 1))

# Seconds: (earliest first event, shortest pause between two). The first is longer than the motion
# before the sound: frame 0 is at rest. The second keeps two events apart in s(t): a mouth shuts
# and a lamp fades to 0.14 in between.
TIMING = dict(ball=(.40, .36), hammer=(.44, .44), mouth=(.34, .16),
              lamp=(.34, .22), roller=(.80, .85), bell=(.44, .36))
# Seconds at the end without an event, so that no motion is cut where it shows one.
FREE_END = .12

# Ranges of a scene's place: offset from the middle, zoom, and a size that each kind maps to its
# radius. Wide enough for clips to differ, narrow enough for a thing to stay in the picture.
PLACE = dict(x=(-.12, .12), y=(-.05, .05), scale=(.85, 1.12), size=(0, 1))


# ------------------------------------------------------------------------------ scenes and events

def sample_colours(rng):
    """-> background (2, 3), top and bottom, and three colours (3, 3), all in [0, 1]. They differ
    by at least 0.5 from both ends of the background and by 0.35 from each other."""
    def sample_background():
        return rng.uniform(0, 1, (2, 3)) * rng.uniform(.25, 1)
    back, colours = sample_background(), []
    while len(colours) < 3:
        colour = rng.uniform(0, 1, 3)
        from_back = np.linalg.norm(colour - back, axis=1).min()
        from_others = [np.linalg.norm(colour - other) for other in colours]
        if from_back > .5 and all(distance > .35 for distance in from_others):
            colours.append(colour)
        # A mid-grey background leaves no room for three colours: start again now and then.
        elif rng.random() < .02:
            back, colours = sample_background(), []
    return back, np.array(colours)


def sample_material(rng):
    """What a thing sounds like: hit (pitch .. drop) or singing (voice .. vibrato)."""
    def log_uniform(low, high):
        return np.exp(rng.uniform(np.log(low), np.log(high)))

    # The order of these lines is the order of the draws: another order is another world.
    return dict(
        pitch=log_uniform(110, 2800),                     # Hz, of the first ringing mode
        ratios=np.cumsum(rng.uniform(.45, 1.6, 4)),       # frequencies of modes, in pitches
        levels=rng.uniform(.1, 1, 4) * (.1 if rng.random() < .25 else 1),     # their amplitudes
        ring=log_uniform(.015, .5),                       # s, decay time of the first mode
        noise=rng.uniform(.1, 1.5),                       # amplitude of the burst at contact
        burst=log_uniform(.003, .09),                     # s, its decay time
        thud=rng.uniform(0, 1.2) * (rng.random() < .4),   # amplitude of a 70 Hz body
        drop=rng.uniform(0, .6) * (rng.random() < .3),    # share by which the pitch falls
        voice=log_uniform(75, 800),                       # Hz, fundamental of a singing voice
        breath=rng.uniform(0, .6) ** 2,                   # amplitude of breath noise
        rough=rng.uniform(0, .3) ** 2,                    # random change of the pitch
        formants=log_uniform([250, 600, 1800], [1000, 2500, 4500]),           # (3,) Hz
        vibrato=rng.uniform(0, .04),                      # regular change of the pitch
    )


def sample_scene(rng, kind=None):
    """What is in a clip, where, in which colours and of which material; nothing about events."""
    kind = kind or KINDS[rng.integers(len(KINDS))]
    back, colours = sample_colours(rng)
    material = sample_material(rng)
    place = {name: rng.uniform(low, high) for name, (low, high) in PLACE.items()}
    flip = bool(rng.random() < .5)
    return dict(kind=kind, back=back, colours=colours, **place, flip=flip, material=material)


def sample_events(kind, seconds, rng):
    """Irregular event times (n,) and durations (n,) in seconds: up to 6 in a clip of under 3 s, up
    to 3 a second in longer ones. Only mouths have a duration."""
    first, pause = TIMING[kind]
    spread = rng.uniform(.05, .7)                         # mean extra pause: dense or sparse
    most = rng.integers(1, 7) if seconds < 3 else int(3 * seconds)
    times, durations = [], []
    t = first + rng.exponential(spread)
    while t < seconds - FREE_END and len(times) < most:
        duration = float(np.clip(rng.exponential(.3), .1, .9)) if kind == "mouth" else 0.
        times.append(t)
        durations.append(duration)
        t += duration + pause + rng.exponential(spread)
    return np.array(times), np.array(durations)


# ---------------------------------------------------------------------------------- the state s(t)

def event_response(kind, u, duration):
    """What one event does to s at u seconds from it (F,) -> (F,): see the drawing above."""
    if kind == "ball":
        # Free fall and bounce: a parabola on either side of the contact.
        return np.clip(1 - np.abs(u) / .19, 0, 1) ** 2
    if kind == "hammer":
        # Lift, wait, strike, return.
        return np.interp(u, [-.42, -.22, -.12, 0, .06, .24], [0, -.55, -.55, 1, .8, 0])
    if kind == "mouth":
        return np.interp(u, [-.03, .03, duration, duration + .08], [0, 1, 1, 0])
    if kind == "lamp":
        # Lit in the frame nearest to the event, up to half a frame early; then it fades.
        return np.where(u >= -.5 / FPS, np.exp(-np.maximum(u, 0) / .11), 0)
    # The roller comes at a constant speed and bounces off faster.
    return np.interp(u, [-.78, 0, .45], [0, 1, 0])


def bell_response(u, events, k):
    """The same for a bell, whose event k is a turning point; sides alternate. Each half swing is a
    quarter of a sine and lasts 0.42 s, or half the time to a neighbouring event less than 0.9 s
    away: the bell then swings through from one side to the other."""
    before = events[k] - events[k - 1] if k else 9.
    after = events[k + 1] - events[k] if k + 1 < len(events) else 9.

    def half_swing(u, gap):
        # 0 at u = start, 1 or -1 at u = 0. At least 1 ms: the reader may try two events at once.
        start = min(-gap / 2 if gap < .9 else -.42, -1e-3)
        rise = np.sin(np.pi / 2 * np.clip((u - start) / -start, 0, 1))
        return (-1) ** k * rise * ((u > start) & (u <= 0))
    return half_swing(u, before) + half_swing(-u, after) * (u > 0)


def state_curve(kind, events, durations, t):
    """The state s at times t (F,) -> (F,), given events (n,) and durations (n,) in seconds."""
    t = np.asarray(t, float)
    s = np.zeros(len(t))
    for k, (event, duration) in enumerate(zip(events, durations)):
        if kind == "bell":
            response = bell_response(t - event, events, k)
        else:
            response = event_response(kind, t - event, duration)
        # Where two events overlap the larger response counts.
        s = np.where(np.abs(response) > np.abs(s), response, s)
    return s


# ----------------------------------------------------------------------------------------- pictures

# Each `*_layers` yields the parts of a thing from back to front: (mask, colour). Masks are in
# [0, 1]: (1, H, W or 1) where a part stands still, (F, H, W) where it moves. Arguments: scene;
# states s (F, 1, 1); scene coordinates x (1, 1, W), y (1, H, 1), 0..1 before the zoom; cover, from
# a signed distance to a mask.

def disc(x, y, centre_x, centre_y, radius):
    """Signed distance to a disc: negative in it."""
    return np.sqrt((x - centre_x) ** 2 + (y - centre_y) ** 2) - radius


def box(x, y, centre_x, centre_y, half_width, half_height):
    """Signed distance to a box: negative in it."""
    return np.maximum(np.abs(x - centre_x) - half_width, np.abs(y - centre_y) - half_height)


def turned(x, y, angle):
    """Coordinates along axes that are turned by an angle in radians, clockwise in the picture."""
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def ball_layers(scene, s, x, y, cover):
    ball, ground, holder = scene["colours"]
    r = .13 + .05 * scene["size"]
    floor, top = .86, .12 + r                             # the centre falls from top to floor - r
    yield cover(floor - y), ground
    yield cover(box(x, y, .5, .06, .10, .04)), holder
    yield cover(disc(x, y, .5, top + s * (floor - r - top), r)), ball


def hammer_layers(scene, s, x, y, cover):
    iron, wood, block = scene["colours"]
    head = .12 + .04 * scene["size"]
    # The handle points left from its pivot and is level at the strike.
    along, across = turned(x - .82, y - .60, .75 * (1 - s))
    yield cover(box(x, y, .82 - .50, .60 + head + .13, .20, .13)), block
    yield cover(box(along, across, -.25, 0, .25, .035)), wood
    yield cover(box(along, across, -.50, 0, .10, head)), iron     # touches the block at s = 1


def mouth_layers(scene, s, x, y, cover):
    skin, eyes, lips = scene["colours"]
    w = .19 + .05 * scene["size"]
    h = .02 + .17 * s
    yield cover(disc(x, y, .5, .5, .40)), skin
    for side in (-1, 1):
        yield cover(disc(x, y, .5 + side * .15, .33, .055)), eyes
    # An ellipse of half axes w, h. Its distance is exact on the edge only.
    ellipse = np.sqrt(((x - .5) / w) ** 2 + ((y - .64) / h) ** 2)
    yield cover((ellipse - 1) * np.minimum(w, h)), lips


def lamp_layers(scene, s, x, y, cover):
    glass, pole, _ = scene["colours"]
    light = np.array([1, .97, .8])
    bulb = disc(x, y, .5, .42, .15 + .05 * scene["size"])
    yield cover(box(x, y, .5, .80, .035, .20)), pole
    # A halo that decays away from the bulb, then the bulb: dark glass, and light over it.
    yield .75 * s * np.exp(-np.maximum(bulb, 0) / .16).astype(np.float32), light
    yield cover(bulb), .35 * glass
    yield s * cover(bulb), light


def roller_layers(scene, s, x, y, cover):
    ball, ground, pin = scene["colours"]
    r = .12 + .04 * scene["size"]
    foot = .82
    # The pin leans (up to 0.5 radians) while the ball touches it, for s above 0.93.
    across, along = turned(x - .86, y - foot, .5 * np.clip((s - .93) / .07, 0, 1))
    yield cover(foot - y), ground
    yield cover(box(across, along, 0, -.21, .055, .21)), pin
    yield cover(disc(x, y, .12 + s * (.805 - r - .12), foot - r, r)), ball


def bell_layers(scene, s, x, y, cover):
    bronze, beam, rope = scene["colours"]
    r = .15 + .04 * scene["size"]
    # At rest a bell is symmetric, so a first frame does not show whether the scene is mirrored.
    # Mirrored or not, the bell swings to the same side of the picture first.
    side, down = turned(x - .5, y - .14, .72 * (s if scene["flip"] else -s))
    yield cover(box(x, y, .5, .10, .26, .045)), beam
    yield cover(box(side, down, 0, .16, .022, .16)), rope
    body = np.minimum(disc(side, down, 0, .40, r), box(side, down, 0, .50, r * 1.25, .06))
    yield cover(body), bronze


LAYERS = dict(ball=ball_layers, hammer=hammer_layers, mouth=mouth_layers,
              lamp=lamp_layers, roller=roller_layers, bell=bell_layers)


def draw_scene(scene, s, size=64):
    """Draw a scene in the states s (F,) -> uint8 (F, size, size, 3), or of as many channels as its
    colours have."""
    s = np.asarray(s, np.float32).reshape(-1, 1, 1)                           # (F, 1, 1)
    shape = (len(s), size, size, len(scene["back"][0]))
    pixels = (np.arange(size, dtype=np.float32) + .5) / size                  # centres, in 0..1
    ramp = pixels[:, None, None]                                              # (H, 1, 1)
    picture = (1 - ramp) * scene["back"][0] + ramp * scene["back"][1]
    picture = np.repeat(picture, size, axis=1)[None]                          # (1, H, W, 3)
    # Scene coordinates, x (1, 1, W) and y (1, H, 1): mirrored, moved and zoomed about the middle.
    x = 1 - pixels if scene["flip"] else pixels
    x = ((x - .5 - scene["x"]) / scene["scale"] + .5)[None, None].astype(np.float32)
    y = ((pixels - .5 - scene["y"]) / scene["scale"] + .5)[None, :, None].astype(np.float32)

    def cover(distance):
        # Anti-aliasing: coverage falls from 1 to 0 over one pixel across the edge.
        return np.clip(.5 - distance * (size * scene["scale"]), 0, 1).astype(np.float32)
    for mask, colour in LAYERS[scene["kind"]](scene, s, x, y, cover):
        # Blend only the rows that the mask touches, for speed.
        rows = np.flatnonzero(mask.max((0, 2)) > 0)
        if len(rows) == 0:
            continue
        # Until something moves one picture serves all frames.
        if len(mask) > len(picture):
            picture = np.broadcast_to(picture, shape).astype(np.float32)
        band = slice(rows[0], rows[-1] + 1)
        alpha = mask[:, band, :, None]                                        # (1 or F, rows, W, 1)
        picture[:, band] += alpha * (np.asarray(colour, picture.dtype) - picture[:, band])
    return (np.clip(np.broadcast_to(picture, shape), 0, 1) * 255 + .5).astype(np.uint8)


# ------------------------------------------------------------------------------------------- sounds

def strike_sound(m, rng):
    """One hit on a material m -> (samples,): ringing modes and a burst of noise."""
    seconds = min(.9, 6 * max(m["ring"], m["burst"]) + .03)
    t = np.arange(int(RATE * seconds), dtype=np.float32) / RATE
    out = m["noise"] * rng.standard_normal(len(t), dtype=np.float32) * np.exp(-t / m["burst"])
    # Modes below the Nyquist frequency, higher ones decay faster; the pitch may fall within 40 ms.
    fall = 1 - m["drop"] * (1 - np.exp(-t / .04))
    for k, (ratio, level) in enumerate(zip(m["ratios"], m["levels"])):
        f = m["pitch"] * ratio
        if f < RATE / 2.2:
            out += level * np.sin(2 * np.pi * f * fall * t) * np.exp(-t * (1 + k) / m["ring"])
    out += 1.5 * m["thud"] * np.sin(2 * np.pi * 70 * t) * np.exp(-t / .05)
    # Ten samples of attack against a click, then unit peak.
    attack = np.minimum(1, np.arange(len(t)) / 12 + .2)
    return out * attack / (np.abs(out).max() + 1e-6)


def voice_sound(m, duration, rng):
    """A sung tone of `duration` seconds -> float32 (samples,), its vowel "u", "i", "o" or "a": a
    buzz of unsteady pitch plus breath, shaped by three formants. These move from one tone to the
    next, so that each tone is another vowel of the same voice."""
    n = int(RATE * (duration + .07))
    t = np.arange(n, dtype=np.float32) / RATE
    # Fundamental frequency: a note, a glide, random change every 30 ms, vibrato of 5.5 Hz.
    knots = np.arange(0, duration + .2, .03)
    wander = np.interp(t, knots, rng.normal(0, 1, len(knots)))
    note = m["voice"] * np.exp(rng.normal(0, .15))
    glide = rng.uniform(-.25, .25) * t / duration
    vibrato = m["vibrato"] * np.sin(2 * np.pi * 5.5 * t)
    f0 = note * (1 + glide + m["rough"] * wander + vibrato)
    # A sawtooth has every harmonic, the k-th at 1/k. Formants are peaks 0.3 wide in log frequency.
    buzz = 1 - 2 * (np.cumsum(f0) / RATE % 1)
    padded = 1 << n.bit_length()
    spectrum = np.fft.rfft(buzz + m["breath"] * rng.standard_normal(n), padded)
    f = np.fft.rfftfreq(padded, 1 / RATE) + 1
    formants = m["formants"] * np.exp(rng.normal(0, .25, len(m["formants"])))
    spectrum *= .1 + sum(np.exp(-(np.log(f / formant) / .3) ** 2) for formant in formants)
    out = np.fft.irfft(spectrum)[:n]
    # Attack of 5-50 ms, louder or softer until the end, release of 60 ms.
    attack = rng.uniform(.005, .05)
    envelope = np.interp(t, [0, attack, duration, duration + .06], [0, 1, rng.uniform(.4, 1), 0])
    # Where the first two formants moved names the vowel.
    first_up, second_up = formants[:2] > m["formants"][:2]
    vowel = "uioa"[2 * int(first_up) + int(second_up)]
    return (out * envelope / (np.abs(out).max() + 1e-6)).astype(np.float32), vowel


def off_screen_sound(n, rng):
    """A sound of nothing in the picture -> float32 (n,): a hum, a slow sweep or babble. It fades in
    over 0.3 s or more: no onset that could pass for an event."""
    t = np.arange(n, dtype=np.float32) / RATE
    variety = rng.integers(3)
    if variety == 0:
        f = rng.uniform(50, 220)
        out = sum(rng.uniform(.1, 1) * np.sin(2 * np.pi * f * k * t) for k in range(1, 5))
    elif variety == 1:
        f = rng.uniform(300, 3000) * np.exp(rng.uniform(-.8, .8) * t)
        out = np.sin(2 * np.pi * np.cumsum(f) / RATE)
    else:
        # Low-passed noise, louder and softer 1 to 2.5 times a second.
        out = np.convolve(rng.standard_normal(n), np.hanning(int(rng.uniform(4, 30))), "same")
        out *= .65 + .35 * np.sin(2 * np.pi * rng.uniform(1, 2.5) * t + rng.uniform(0, 6))
    start = rng.uniform(-.6, .5 * t[-1])
    fade = rng.uniform(.3, .8)
    out = out * np.clip((t - start) / fade, 0, 1) ** 2
    return (out / (np.abs(out).max() + 1e-6)).astype(np.float32)


def record(dry, has_events, off_screen, seed):
    """What a microphone makes of the events (samples,) -> float32 (samples,): off-screen sound,
    tilt of the spectrum, room, noise floor and gain. All draws depend on seed and length alone:
    other events with the same seed are in the same room."""
    rng = np.random.default_rng([seed, 1414])
    out, n = dry, len(dry)
    if off_screen:
        # Beside events it stays at or below 0.12 of their full level.
        out = out + off_screen_sound(n, rng) * rng.uniform(.03, .12 if has_events else .5)
    # In the frequency domain, padded to a power of two longer than clip plus echo.
    padded = 1 << (n + RATE // 2).bit_length()
    out = np.fft.rfft(out, padded)
    f = np.maximum(np.fft.rfftfreq(padded, 1 / RATE), 60)
    out *= (f / 800) ** rng.uniform(-.7, .5)              # dull to bright: -4 to +3 dB an octave
    if rng.random() < .5:
        # Half of the rooms echo: decaying noise, well below the direct sound (echo[0] = 1).
        t = np.arange(int(RATE * .5)) / RATE
        echo = rng.standard_normal(len(t)) * np.exp(-t / rng.uniform(.02, .14))
        echo *= 10 ** rng.uniform(-2.2, -1.3)
        echo[0] = 1
        out *= np.fft.rfft(echo, padded)
    out = np.fft.irfft(out, padded)[:n]
    # A noise floor of -80 to -28 dB: rumble in three of ten clips, else white.
    rumbles = rng.random() < .3
    floor = rng.standard_normal(n)
    # (The factor drops out below; without it the last bits of all clips would differ.)
    floor = np.cumsum(floor) * .02 if rumbles else floor
    floor -= floor.mean()
    loudest = np.abs(out).max() if has_events or off_screen else 1.
    out = out / (loudest + 1e-9) + floor / (floor.std() + 1e-9) * 10 ** rng.uniform(-4, -1.4)
    return np.clip(out * 10 ** rng.uniform(-1.2, -.05), -1, 1).astype(np.float32)


def synthesise(scene, events, durations, seconds, seed, off_screen):
    """-> waveform float32 (seconds x 16 000,), the vowels of a mouth, one per event. Each event has
    a random generator to itself: moving one leaves the others as they were."""
    out = np.zeros(round(seconds * RATE), np.float32)
    material = scene["material"]
    if scene["kind"] == "bell":
        # A bell rings longer and clearer than other things of its material.
        material = dict(material, ring=.15 + material["ring"], noise=.3 * material["noise"])
    hit = strike_sound(material, np.random.default_rng([seed, 1618]))
    vowels = []
    for k, (event, duration) in enumerate(zip(events, durations)):
        rng = np.random.default_rng([seed, 1618, 1 + k])
        sound = hit
        if scene["kind"] == "mouth":
            sound, vowel = voice_sound(material, duration, rng)
            vowels.append(vowel)
        start = round(event * RATE)
        sound = sound[:max(0, len(out) - start)]
        out[start:start + len(sound)] += sound * 10 ** rng.uniform(-.4, 0)    # up to 8 dB softer
    return record(out, len(events) > 0, off_screen, seed), vowels


# ----------------------------------------------------------------------------------- complete clips

# kind: (subjects, verbs)
PHRASES = dict(
    ball=("a ball/a heavy ball/something round",
          "drops onto the floor/falls and bounces/hits the ground"),
    hammer=("a hammer/a mallet/somebody's hammer",
            "strikes a block/winds up and strikes/pounds the block"),
    mouth=("a face/a mouth/a singer", "sings a tone/opens as long as the voice lasts/calls out"),
    lamp=("a lamp/a light/a bulb", "flashes and fades/lights up/blinks"),
    roller=("a slow ball/a rolling ball/a bowling ball",
            "rolls into a pin/bumps a pin/rolls and knocks"),
    bell=("a bell/a hanging bell/a church bell", "swings and rings/rings where it turns/tolls"),
)
COUNTS = ("", "once", "twice", "three times", "four times", "five times", "six times")


def sample_caption(kind, n, off_screen, rng):
    """One sentence about a clip of n events. About every third one counts them."""
    subjects, verbs = (phrases.split("/") for phrases in PHRASES[kind])
    subject = subjects[rng.integers(len(subjects))]
    if n == 0:
        verb = ("rests", "does not move", "keeps still")[rng.integers(3)]
        return f"{subject} {verb}" + (", a sound comes from elsewhere" if off_screen else "")
    count = f" {COUNTS[n]}" if n < len(COUNTS) and rng.random() < .35 else ""
    return f"{subject} {verbs[rng.integers(len(verbs))]}{count}"


def toybox_clip(seed, size=64, frames=FRAMES, kind=None, video=True, variation=0, events=None):
    """One clip of the toybox, a pure function of its arguments.

    size        height and width in pixels, a multiple of 16
    video       False leaves out the pictures, which take most of the time
    variation   k > 0: the same thing (scene, colours, material) with other events in another room
    events      (n,) in seconds: these instead of random ones, of 0.1 s if it is a mouth

    -> dict:
    video       uint8 (F, size, size, 3)           audio       float32 (F / 24 x 16 000,)
    caption     a sentence                         speech      what a mouth says: letters
    events      (n,) in seconds                    durations   (n,) in seconds
    state       float (F,)                         off_screen  bool
    and seed, kind, scene.
    """
    rng = np.random.default_rng([seed, 2718])
    scene = sample_scene(rng, kind)
    kind = scene["kind"]
    seconds = frames / FPS
    if variation:
        rng = np.random.default_rng([seed, 2718, variation])
    # At least 8 % of the clips are silent, 10 % have off-screen sound alone: in both nothing moves.
    # A fifth of the others have off-screen sound too.
    mood = rng.random()
    drawn = np.zeros(0), np.zeros(0)
    if mood > .18:
        drawn = sample_events(kind, seconds, rng)
    if events is not None:
        drawn = events, np.full(len(events), .1)
    events, durations = drawn
    off_screen = bool(.08 <= mood < .18 or rng.random() < .2 * (mood > .18))
    state = state_curve(kind, events, durations, np.arange(frames) / FPS)
    room = seed + (variation << 40)
    audio, vowels = synthesise(scene, events, durations, seconds, room, off_screen)
    clip = dict(seed=seed, kind=kind, scene=scene, events=events, durations=durations, state=state,
                off_screen=off_screen, audio=audio, speech=" ".join(vowels),
                caption=sample_caption(kind, len(events), off_screen, rng))
    if video:
        clip["video"] = draw_scene(scene, state, size)
    return clip


def vae_training_pair(seeds, size=64, blocks=4):
    """Training data of a VAE that codes stretches of 4 frames independently (kernel_t = 1): two
    things of one kind that move alike, frame 0 and `blocks` stretches, mostly moving ones
    -> uint8 (2, 1 + 4 * blocks, size, size, 3). All 49 frames would mostly stand still. seeds: any
    integers."""
    rng = np.random.default_rng([*seeds, 3141])
    scene = sample_scene(rng)
    events, durations = sample_events(scene["kind"], FRAMES / FPS, rng)
    state = state_curve(scene["kind"], events, durations, np.arange(FRAMES) / FPS)
    # Stretches that move are eleven times as likely as those at rest.
    stretches = state[1:].reshape(-1, 4)                                      # (L - 1, 4)
    odds = .1 + (np.abs(stretches).max(1) > .05)
    chosen = rng.choice(len(stretches), blocks, replace=False, p=odds / odds.sum())
    state = np.concatenate([state[:1], stretches[chosen].ravel()])            # (1 + 4 * blocks,)
    other = sample_scene(rng, scene["kind"])
    return np.stack([draw_scene(scene, state, size), draw_scene(other, state, size)])


# ---------------------------------------------------------------------- reading events from a video

# Drawings that a frame is compared with: a step of 1/60 is half a pixel of a ball's fall at 64 px.
# Measured on 60 clips: 31, 61 and 121 states give a mean timing error of 1.8-1.9 ms, 16 give 2.5.
READER_STATES = 61
# Frames of generated clips that can be recognised have residuals under 0.4, frames of something
# else over 1.3. At 1 a frame is as far from its closest drawing as drawings are from their mean.
UNREADABLE = 1.
# Ball, hammer, roller, bell: a frame at a contact reads 0.73 or more, so motion may stop a fifth
# short of it. Between two events all kinds fall lower.
PEAK = .6
TIE = .02        # states that share a top: a step of the drawings of ball, mouth, lamp, roller
RISEN = .5       # mouth, lamp: an event is a rising through the middle ...
FALLEN = .35     # ... after a fall below this. 9 steps of hysteresis: no rising counts twice.
MOVING = .15     # residuals are averaged over frames above this state: those at rest are easy
# Squared error of the best drawing of a picture, over the variance of the picture. At 32 pixels 32
# pictures of the toybox have up to .009, as JPEG of quality 75 up to .025; 57 photographs and first
# frames of real clips .22 or more.
DRAWN = .07


def track_states(video, scene):
    """Analysis by synthesis: video uint8 (F, H, W, 3) of a known scene -> states (F,), residuals
    (F,): squared distance to the closest drawing, over the variance of the drawings. 0 is perfect.
    """
    grid = np.linspace(*STATES[scene["kind"]], READER_STATES)                 # (S,)
    drawn = draw_scene(scene, grid, video.shape[1])
    drawn = drawn.reshape(len(grid), -1).astype(np.float32)                   # (S, pixels)
    given = video.reshape(len(video), -1).astype(np.float32)                  # (F, pixels)
    # |given - drawn|^2, multiplied out.
    error = (given ** 2).sum(1)[:, None] - 2 * given @ drawn.T + (drawn ** 2).sum(1)[None]
    best = error.argmin(1)                                                    # (F, S) -> (F,)
    spanned = ((drawn - drawn.mean(0)) ** 2).sum(1).mean()
    return grid[best], error[np.arange(len(video)), best].clip(0) / spanned


def detect_events(kind, s, valid):
    """State curve (F,) -> event times (n,) in seconds. valid: booleans (F,), which frames could be
    read; an event is left out unless every frame that it was concluded from could."""
    found = find_risings(kind, s) if kind in ("mouth", "lamp") else find_peaks(kind, s)
    return np.array([t for t, first, last in found if valid[first:last + 1].all()]) / FPS


def find_risings(kind, s):
    """-> list of (time, first and last frame that it was concluded from), all in frames."""
    found = []
    # What is up in frame 0 has not risen.
    is_up = s[0] >= RISEN
    for f in range(1, len(s)):
        if not is_up and s[f] >= RISEN:
            # A lamp is lit at once. A mouth passed the middle somewhere between two frames.
            is_between = kind == "mouth" and s[f - 1] < RISEN
            when = f - (s[f] - RISEN) / (s[f] - s[f - 1]) if is_between else f
            found.append((when, f - 1, f))
        is_up = s[f] > FALLEN if is_up else s[f] >= RISEN
    return found


def find_peaks(kind, s):
    """The same for peaks: one stretch of frames above PEAK, on one side, is one event."""
    height = np.abs(s) if kind == "bell" else s
    side = np.sign(s) * (height >= PEAK)                  # 1 or -1 within a stretch, else 0
    edges = [0, *np.flatnonzero(np.diff(side)) + 1, len(s)]
    tops, spans = [], []
    for first, end in zip(edges[:-1], edges[1:]):
        stretch = height[first:end]
        # A stretch that still rises where the clip ends has not reached its event.
        still_rising = end == len(s) and stretch[-1] == stretch.max()
        if side[first] and not still_rising:
            tops.append(np.flatnonzero(stretch >= stretch.max() - TIE).mean() + first)
            # Its height rests on the frames on either side, too. (`end` may lie behind the clip.)
            spans.append((max(first - 1, 0), end))
    return [(refine_peak(kind, s, tops, i), *span) for i, span in enumerate(spans)]


def refine_peak(kind, s, tops, i):
    """The time around tops[i] (in frames) whose event explains the states nearby best: synthesis
    again, in steps of 0.1 frames. The highest frame is not enough: a hammer falls fast and rises
    slowly, so it mostly comes after the strike."""
    frames = np.arange(max(0, round(tops[i]) - 3), min(len(s), round(tops[i]) + 4))
    size = np.abs if kind == "bell" else np.asarray       # a bell's event may be on either side

    def misfit(t):
        events = np.array([*tops[:i], t, *tops[i + 1:]]) / FPS
        expected = state_curve(kind, events, np.zeros(len(tops)), frames / FPS)
        return np.square(size(expected) - size(s[frames])).sum()
    candidates = tops[i] + np.arange(-10, 11) / 10
    return candidates[int(np.argmin([misfit(t) for t in candidates]))]


def detect_clip_events(video, clip, start=0., end=np.inf):
    """Video -> event times (n,) and residuals of moving frames from `start` to `end` seconds, share
    of frames that can be read."""
    s, residual = track_states(video, clip["scene"])
    valid = residual < UNREADABLE
    # The whole video is read: a cut within a motion would be an event too many, or too few.
    events = detect_events(clip["kind"], s, valid)
    events = events[(events >= start) & (events < end)]
    t = np.arange(len(s)) / FPS
    moving = (np.abs(s) > MOVING) & (t >= start) & (t < end)
    return events, residual[moving], float(valid.mean())


def fit_scene(frame, kind):
    """Fit a scene of a known kind to a first frame, uint8 (H, W, 3), at rest -> scene.

    A drawing is linear in its five colours: for a given place the best ones are a least-squares
    solution. Place and mirror image are searched: 150 at random, then 120 shrinking steps from the
    best. Events of 48 true clips, read by fitted scenes: F1 1.000 at 50 ms, residual 0.03.
    """
    rng = np.random.default_rng(0)
    size = len(frame)
    pixels = frame.reshape(-1, 3) / 255.                                      # (H W, 3)
    low, high = np.array(list(PLACE.values()), float).T                       # (4,) each
    one = np.eye(5)

    def attempt(place, flip):
        """-> squared error, place (4,), scene with the best colours."""
        scene = dict(zip(PLACE, place), kind=kind, flip=flip)
        # The share of each colour in each pixel: a picture of five channels, one per colour. (At
        # rest a lamp's light, of three channels, is not drawn.)
        maps = draw_scene(dict(scene, back=one[:2], colours=one[2:]), [0.], size)
        maps = maps.reshape(-1, 5) / 255.                                     # (H W, 5)
        # Normal equations; the ridge keeps colours that no pixel shows finite.
        colours = np.linalg.solve(maps.T @ maps + 1e-4 * np.eye(5), maps.T @ pixels).clip(0, 1)
        error = ((maps @ colours - pixels) ** 2).sum()
        return error, place, dict(scene, back=colours[:2], colours=colours[2:])
    first = [attempt(rng.uniform(low, high), bool(i % 2)) for i in range(150)]
    best = min(first, key=lambda result: result[0])
    for i in range(120):
        # Steps begin at a quarter of the range and shrink by 3 % a round; a coordinate moves with
        # probability 0.6.
        step = (high - low) / 4 * .97 ** i * rng.normal(size=4) * (rng.random(4) < .6)
        _, place, scene = best
        result = attempt((place + step).clip(low, high), scene["flip"])
        best = result if result[0] < best[0] else best
    return best[2]


def is_toybox_picture(picture):
    """Is a picture uint8 (H, W, 3) a first frame of the toybox? Analysis by synthesis once more: of
    one of the kinds there is a scene that draws it. 32 pixels a side are enough."""
    pixels = picture.astype(np.float32)
    variance = ((pixels - pixels.mean((0, 1))) ** 2).mean()
    errors = (((draw_scene(fit_scene(picture, kind), [0.], len(picture)) - pixels) ** 2).mean()
              for kind in KINDS)
    return any(error < DRAWN * variance for error in errors)

"""Paths, targets, losses and guidance: the arithmetic of flow matching, a few lines each.

**The path.** Noise level sigma in [0, 1]: 0 is clean, 1 is noise. Between a latent z and noise eps runs a straight line,
and the network learns its velocity:

    x = (1 - sigma) z + sigma eps          v = dx/dsigma = eps - z          so   z = x - sigma v

Sampling walks it back from 1 to 0. All papers here use it; SyncFlow's clock is tau = 1 - sigma and its velocity is -v.

**Motion-aware loss** (Syncphony eq. 1). Most of a clip stands still, and a network that ignores what moves is nearly right.
So the error counts more where the TRUE latent leaves its predecessor, m_l = z_l - z_(l-1): |z^ - z|^2 + lambda |(z^ - z) m|^2.
The network predicts v, and z^ - z = -sigma (v^ - v), so the same weight 1 + lambda m^2 stands on the velocity error.
Two things the equation leaves open: the first latent has no predecessor (m = 0, likewise for the second where the first is
coded by rules of its own), and real latents have heavy tails. Unclipped, a handful of values with m^2 in the hundreds
own the loss; |m| is clipped at 1.5 standard deviations.

**Guidance**, one form for every rule of the three papers; S = 1 means off and costs nothing:

    v = v_pos + sum_k (S_k - 1) (v_pos - v_neg_k)          Syncphony eq. 6: S = 1 + w_a (audio), S = 1 + w_t (text)

**Two streams** go on one clock (SyncFlow), or each on its own (Harmony): sigma = 0 for one of them makes the other's task one-way.

**The staged path** (Pyramid Flow). At high noise nothing fine can be seen, so why compute it at full resolution? The way is cut
into three pieces, the first at a quarter of the side, the next at a half. Each is a straight line of its own, between a noisier
start and a less noisy end with the SAME noise in both, so v = start - end, and sigma runs from 1 to 0 within the piece:

    start = S eps + (1 - S) up(z coarser)        end = E eps + (1 - E) z        x = sigma start + (1 - sigma) end

Where one piece ends the picture is doubled, which copies its noise into 2x2 blocks; a noise that is negatively correlated in
a block (`block_noise`) makes it white again, at the price of a step back up in noise level: S of a piece is above the E before.

    B batch · C channels · L latents · h w latent grid · sigma (B, L), one noise level per latent
"""
import torch

GAMMA = 1 / 3                                                                 # correlation of the repairing noise in a block: -gamma
BUCKETS = 4                                                                   # the loss is reported for four noise levels


def add_noise(z, eps, sigma):
    """The path. z, eps (B, C, L, h, w), sigma (B, L) in [0, 1] -> x of the same shape."""
    s = sigma[:, None, :, None, None]                                         # (B, 1, L, 1, 1)
    return (1 - s) * z + s * eps


def velocity(z, eps):
    return eps - z                                                            # d/dsigma of the path


def shift_sigma(sigma, k):
    """Spend more time at high noise (k > 1): s' = k s / (1 + (k-1) s). Fixes 0 and 1; k = 1 changes nothing.

    Latents that are zero where nothing moves are large where something does: at sigma = 0.5 every motion is in plain sight
    and only noise is left to remove. That a motion follows from the SOUND is learned near sigma = 1, so that is where to
    practise. After 400 steps (one seed) the error of z at sigma = 1 was 0.51 with k = 1 and 0.35 with k = 4."""
    return k * sigma / (1 + (k - 1) * sigma)


def draw_sigma(u, how="uniform", shift=1.):
    """Noise levels for training from u ~ U(0, 1), any shape. 'logit-normal' (SD3) favours the middle of the path."""
    if how == "logit-normal":
        u = torch.special.ndtri(u.clamp(1e-5, 1 - 1e-5)).sigmoid()            # a standard normal through a sigmoid
    return shift_sigma(u, shift)


def motion_weight(z, lam=1., clip=1.5, skip=1):
    """1 + lambda m^2 with m_l = z_l - z_(l-1), and m = 0 for the first `skip` latents. (B, C, L, h, w) -> same; no gradient."""
    m = (z[:, :, 1:] - z[:, :, :-1]).detach().clamp(-clip, clip)              # (B, C, L-1, h, w)
    m = torch.cat([torch.zeros_like(z[:, :, :1]), m], 2)
    m[:, :, :skip] = 0
    return 1 + lam * m.square()                                               # Syncphony eq. 1


def flow_loss(v_hat, v, sigma, weight=None):
    """Weighted squared error -> mean loss, and its unweighted mean in four buckets of sigma (nan where none fell).

    v_hat, v, weight (B, C, L, h, w); sigma (B, L)."""
    error = (v_hat.float() - v).square()                                      # (B, C, L, h, w)
    each = error.detach().mean((1, 3, 4))                                     # (B, L)
    bucket = (sigma * BUCKETS).long().clamp(max=BUCKETS - 1)
    report = torch.stack([each[bucket == b].mean() for b in range(BUCKETS)])
    return (error if weight is None else error * weight).mean(), report


def guide(v_pos, *terms):
    """v_pos + sum (S - 1)(v_pos - v_neg) over terms (S, v_neg). A term whose S is 1 needs no v_neg."""
    v = v_pos
    for S, v_neg in terms:
        if S != 1:
            v = v + (S - 1) * (v_pos - v_neg)                                 # Syncphony eqs. 2, 5, 6
    return v


def a2v_loss(model, z, words, sound, g, deaf=False, lam=1., how="uniform", shift=4., corrupt=.2):
    """Syncphony's training objective in the parallel layout -> loss, report of four noise buckets.

    z (B, C, L, h, w) normalised latents, words and sound of the same clips as `MMDiT.read` and `MMDiT.listen` take them, g: a
    CPU generator from which everything random is drawn. The context is lightly noised, and the network is not told: in a roll-out it will
    stand on its own small errors. Audio is never dropped (silence is information), but in a few steps the audio LAYERS are
    skipped (`deaf`): guidance will run that path, and without a pretrained backbone it would be one the network never took."""
    B, C, L, h, w = z.shape
    to = lambda t: t.to(z.device)
    sigma = to(draw_sigma(torch.rand(B, L - 1, generator=g), how, shift))     # every latent has a noise level of its own
    eps = to(torch.randn(B, C, L - 1, h, w, generator=g))
    history = to(corrupt * torch.rand(B, 1, generator=g)).expand(B, L)
    clean = add_noise(z, to(torch.randn(B, C, L, h, w, generator=g)), history)
    target = z[:, :, 1:]
    text, _, pooled = model.read(words)
    v_hat = model.parallel(clean, add_noise(target, eps, sigma), sigma, text, pooled, None if deaf else model.listen(sound))
    weight = motion_weight(z, lam, skip=2)[:, :, 1:]
    return flow_loss(v_hat, velocity(target, eps), sigma, weight)


# ------------------------------------------------------------------------------------------------ the staged path of Pyramid Flow

def stages(n=3, shift=1.):
    """The n pieces into which the way from noise (1) to latent (0) is cut; piece s runs at 2^(s-n+1) of the full side.

    -> dicts: noise levels `start` and `end`; `times` (from, to), what the network is told, of 1000 .. 1; `alpha`, `beta` of
    the jump that begins it, x <- alpha up(x) + beta b. `shift` as in `shift_sigma`, on the grid of 1000 that is cut at thirds."""
    grid = [shift_sigma((1000 - i) / 1000, shift) for i in range(1000)]
    cuts = [grid[int(1000 * s / n)] for s in range(n)] + [0.]
    pieces = []
    for s in range(n):
        p, root = 1 - cuts[s], (1 + 1 / GAMMA) ** .5                          # share of signal where the last piece ended; 2
        alpha = 1 / (root * (1 - p) + p)
        pieces.append(dict(start=1 - p * alpha, end=cuts[s + 1], alpha=alpha if s else 1., beta=alpha * (1 - p) / GAMMA ** .5 if s else 0.))
    length, gone = sum(q["start"] - q["end"] for q in pieces), 0.
    for q in pieces:                                                          # time is told in proportion to the way gone
        first, gone = gone, gone + (q["start"] - q["end"]) / length
        q["times"] = (1000 * grid[int(1000 * first)], 1000 * grid[min(int(1000 * gone), 999)])
    return pieces


def sampling_grid(piece, n):
    """n network calls within a piece -> times (n,), sigmas (n + 1,), both float64. The last sigma before 0 is 0.001, so the
    last call moves next to nothing. That is how the published loop runs; it is kept."""
    hi, lo = piece["times"]
    return (torch.linspace(hi, hi + (lo - hi) * .999, n, dtype=torch.float64),
            torch.cat([torch.linspace(1, .001, n, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]))


def halve(z):                                                                 # (B, C, L, h, w) -> half the side, 2x2 means
    return torch.nn.functional.avg_pool3d(z, (1, 2, 2))


def double(z):
    return z.repeat_interleave(2, -1).repeat_interleave(2, -2)


def levels(z, n=3):
    """Latents at n resolutions, coarsest first."""
    out = [z]
    for _ in range(n - 1):
        out.insert(0, halve(out[0]))
    return out


def noise_levels(eps, n=3):
    """The same for noise: a mean of four has half the deviation, so it is doubled, and stays N(0, 1)."""
    out = [eps]
    for _ in range(n - 1):
        out.insert(0, 2 * halve(out[0]))
    return out


def block_noise(shape, g=None):
    """b: unit variance, correlation -1/3 within each 2x2 block, which therefore sums to zero. (B, C, L, h, w)

    N(0, 1) minus the mean of its block has variance 3/4 and covariance -1/4: times (4/3)^(1/2) it is b, exactly."""
    x = torch.randn(shape, generator=g)
    return (4 / 3) ** .5 * (x - double(halve(x)))


def history(z_levels, u, s):
    """What the latent number u sees of those before it while it is made at level s, oldest first: the last one as sharp as
    itself, every earlier one a level coarser, and all the rest at the coarsest. -> list of (B, C, L_k, h_k, w_k)"""
    clips, l = [], u
    for level in range(s, 0, -1) or (0,):
        if l > 0:
            l -= 1
            clips.insert(0, z_levels[level][:, :, l:l + 1])
    return ([z_levels[0][:, :, :l]] if l > 0 else []) + clips


def stage_ends(z_levels, eps_levels, piece, s):
    """The straight line of stage s, from its noisy start to its less noisy end, with the SAME noise in both -> start, end."""
    z, eps = z_levels[s], eps_levels[s]
    start = eps if s == 0 else piece["start"] * eps + (1 - piece["start"]) * double(z_levels[s - 1])
    end = z if piece["end"] == 0 else piece["end"] * eps + (1 - piece["end"]) * z
    return start, end


def pyramid_loss(model, z, words, sound, numbers, g, deaf=False, lam=1., corrupt=1 / 3, columns=(0, 1, 1, 2)):
    """Syncphony's objective in Pyramid Flow's own layout: of every clip ONE latent, at one stage -> loss, report of the stages.

    z (B, C, L, h, w) normalised latents, words, sound, g and deaf as in `a2v_loss`. Clip number r of the whole batch, of which these
    are the `numbers`, trains stage columns[r mod 4]. Coarse stages are cheap, so where the fine stage stands late in a clip and sees a long history, they
    stand early, and the other way round: u fine, L - u coarse. The history is noised by c <= `corrupt`, untold.
    Eq. 1 speaks of the difference of neighbouring latents: here of the clean ones at the resolution of the stage."""
    B, _, L = z.shape[:3]
    to, n = lambda t: t.to(z.device), max(columns) + 1
    u_fine = int(torch.randint(1, L, (), generator=g))
    (text, mask, pooled), audio = model.read(words), None if deaf else model.listen(sound)
    losses, report = [], torch.full((n,), float("nan"), device=z.device)
    for s, piece in enumerate(stages(n)):
        rows = torch.tensor([i for i, r in enumerate(numbers) if columns[r % len(columns)] == s], dtype=torch.long)
        if len(rows) == 0:
            continue
        u, z_levels = u_fine if s == n - 1 else L - u_fine, levels(z[rows], n)
        now = [zk[:, :, u:u + 1] for zk in z_levels]
        eps = noise_levels(to(torch.randn(now[-1].shape, generator=g)), n)
        c = to(corrupt * torch.rand(len(rows), 1, generator=g))
        before = [add_noise(h, to(torch.randn(h.shape, generator=g)), c.expand(-1, h.shape[2])) for h in history(z_levels, u, s)]
        i = to(torch.randint(1000, (len(rows), 1), generator=g))
        (start, end), sigma, (hi, lo) = stage_ends(now, eps, piece, s), 1 - i / 1000, piece["times"]
        v_hat = model([*before, add_noise(end, start, sigma)], (hi + (lo - hi) * i / 1000)[:, 0], text[rows], mask[rows], pooled[rows],
                      None if deaf else audio[rows])
        weight = motion_weight(z_levels[s][:, :, u - 1:u + 1], lam, skip=2 if u == 1 else 1)[:, :, 1:]
        loss, _ = flow_loss(v_hat, start - end, sigma, weight)
        report[s] = (v_hat.detach().float() - (start - end)).square().mean()
        losses.append(loss * len(rows))
    return sum(losses) / B, report


# ------------------------------------------------------------------------------------------------ two streams (SyncFlow)

def couple(noise, data):
    """Minibatch optimal transport (Tong et al. 2024): which noise goes to which sample, so that the squared distances sum to the
    least -> order (B,), noise[order] goes with data. Exact, every noise used once. noise, data: (B, ...), or lists of such for
    several streams, whose costs are summed after dividing by their sizes: there is ONE order for all of them.

    It is the noise that is permuted: captions stay with their clips. In thousands of dimensions and batches of 16 all noises are
    about equally far (the cost falls by 2-4 %), and given a text the coupling is skewed; so it is a flag, and off by default."""
    from scipy.optimize import linear_sum_assignment                          # comes with librosa
    pairs = zip(noise, data) if isinstance(noise, (list, tuple)) else [(noise, data)]
    cost = sum(torch.cdist(e.flatten(1).double(), z.flatten(1).double()).square() / e[0].numel() for e, z in pairs)
    rows, columns = linear_sum_assignment(cost.cpu().numpy())                 # noise rows[i] = i goes with data columns[i]
    return torch.as_tensor(columns).argsort()


def t2av_loss(net, z_v, z_a, words, g, stage="joint", ot=False, how="uniform", shift=1.):
    """SyncFlow's objective: rectified flow on both streams with one clock -> loss, report (video, audio).

    z_v (B, C, L, h, w), z_a (B, A, S) normalised latents; words as `DualTower.read` takes them; g: a CPU generator. stage 'video':
    the video stream alone; 'audio': the loss is audio's alone, on video features at the same noise level; 'joint': both."""
    to = lambda t: t.to(z_v.device)
    sigma = to(draw_sigma(torch.rand(len(z_v), generator=g), how, shift))     # (B,): tau = 1 - sigma in the paper
    eps_v, eps_a = to(torch.randn(z_v.shape, generator=g)), to(torch.randn(z_a.shape, generator=g))
    if ot:
        order = couple([eps_v, eps_a], [z_v, z_a])
        eps_v, eps_a = eps_v[order], eps_a[order]
    x_v = add_noise(z_v, eps_v, sigma[:, None])
    x_a = add_noise(z_a[..., None, None], eps_a[..., None, None], sigma[:, None])[..., 0, 0]
    v_v, v_a = net(None if net.cfg.blind else x_v, None if stage == "video" else x_a, sigma, *net.read(words))
    error_v, error_a = (z_v.new_zeros(()) if v is None else (v.float() - velocity(z, eps)).square().mean()
                        for v, z, eps in ((v_v, z_v, eps_v), (v_a, z_a, eps_a)))
    loss = dict(video=error_v, audio=error_a, joint=error_v + error_a)[stage]
    return loss, torch.stack([error_v.detach(), error_a.detach()])


def picture_loss(net, z, words, g, how="uniform", shift=1.):
    """Rectified flow on single pictures, the first latents z (B, C, 1, h, w) of clips -> loss. Most of what a text-to-video tower has to learn is how
    things look, and that every clip shows only once: Open-Sora's, which SyncFlow starts from, had seen images first."""
    sigma = draw_sigma(torch.rand(len(z), generator=g), how, shift).to(z.device)
    eps = torch.randn(z.shape, generator=g).to(z.device)
    v = net(add_noise(z, eps, sigma[:, None]), None, sigma, *net.read(words))[0]
    return (v.float() - velocity(z, eps)).square().mean()


# ------------------------------------------------------------------------------------------------ cross-task synergy (Harmony)

def cts_loss(net, z_v, z_a, words, g, ref=None, ref_mask=None, stage="joint", lam_v=.1, lam_a=.3, shift=5., how="uniform", begun=.5, lam_joint=1.):
    """Harmony's objective: the joint task, and beside it the two one-way tasks, in which the other stream is given, clean (eqs. 3, 4)

        L = L_joint + lambda_v L_driven^audio + lambda_a L_driven^video

    -> loss, report (joint video, joint audio, video driven by audio, audio driven by video). Joint, nothing is worth aligning to while
    both streams are noise; a clean partner shows from the first step what belongs together. Mind the names: lambda_v weighs
    the AUDIO-driven loss, for that one trains the video. A driven loss is that of the made stream alone: what the network says
    of the given one is ignored. lam_joint = 0 leaves one-way tasks alone (figure 3).

    z_v (B, C, L, h, w), z_a (B, A, S) normalised latents; words: (text, mask, told, told_mask) of the clips; ref (B, A, R) clean
    references with mask (B, R); g: a CPU generator. All three forwards share one noise level and one noise per clip. Of a share `begun`
    of the clips the first latent is given, as Wan2.2 learned it: it is clean, and not part of the loss. stage 'video', 'audio'
    or 'timbre': one stream alone, before they meet."""
    to = lambda t: t.to(z_v.device)
    sigma = to(draw_sigma(torch.rand(len(z_v), generator=g), how, shift))     # (B,)
    eps_v, eps_a = to(torch.randn(z_v.shape, generator=g)), to(torch.randn(z_a.shape, generator=g))
    sigma_v = sigma[:, None].repeat(1, z_v.shape[2])                          # (B, L)
    sigma_v[:, 0] *= to(torch.rand(len(z_v), generator=g) >= begun)           # a picture to begin with
    x_v, x_a = add_noise(z_v, eps_v, sigma_v), add_noise(z_a[..., None, None], eps_a[..., None, None], sigma[:, None])[..., 0, 0]
    clean, none, made = torch.zeros_like(sigma), z_v.new_zeros(()), (sigma_v > 0).float()
    video_error = lambda v: ((v.float() - velocity(z_v, eps_v)).square().mean((1, 3, 4)) * made).sum() / made.sum()
    audio_error = lambda v: (v.float() - velocity(z_a, eps_a)).square().mean()
    if stage == "video":
        loss = video_error(net.converse(x_v, None, sigma_v, None, *words)[0])
        return loss, torch.stack([loss.detach(), none, none, none])
    if stage != "joint":
        loss = audio_error(net.converse(None, x_a, None, sigma, *words, ref, ref_mask)[1])
        return loss, torch.stack([none, loss.detach(), none, none])
    joint_v = joint_a = none
    if lam_joint:
        v_v, v_a = net.converse(x_v, x_a, sigma_v, sigma, *words, ref, ref_mask)
        joint_v, joint_a = video_error(v_v), audio_error(v_a)                 # eq. 4: L_joint is their sum
    driven_v = video_error(net.converse(x_v, z_a, sigma_v, clean, *words, ref, ref_mask)[0]) if lam_v else none         # by clean audio
    driven_a = audio_error(net.converse(z_v, x_a, clean, sigma, *words, ref, ref_mask)[1]) if lam_a else none         # by clean video
    loss = lam_joint * (joint_v + joint_a) + lam_v * driven_v + lam_a * driven_a                  # eq. 3
    return loss, torch.stack([t.detach() for t in (joint_v, joint_a, driven_v, driven_a)])

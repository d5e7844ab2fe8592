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


def sample_sigma(u, how="uniform", shift=1.):
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


def combine_guidance(v_pos, *terms):
    """v_pos + sum (S - 1)(v_pos - v_neg) over terms (S, v_neg). A term whose S is 1 needs no v_neg."""
    v = v_pos
    for S, v_neg in terms:
        if S != 1:
            v = v + (S - 1) * (v_pos - v_neg)                                 # Syncphony eqs. 2, 5, 6
    return v


def syncphony_loss(model, z, words, sound, g, deaf=False, lam=1., how="uniform", shift=4., corrupt=.2):
    """Syncphony's training objective in the parallel layout -> loss, report of four noise buckets.

    z (B, C, L, h, w) normalised latents, words and sound of the same clips as `MMDiT.encode_text` and `MMDiT.encode_audio` take them, g: a
    CPU generator from which everything random is drawn. The context is lightly noised, and the network is not told: in a roll-out it will
    stand on its own small errors. Audio is never dropped (silence is information), but in a few steps the audio LAYERS are
    skipped (`deaf`): guidance will run that path, and without a pretrained backbone it would be one the network never took."""
    B, C, L, h, w = z.shape
    to = lambda t: t.to(z.device)
    sigma = to(sample_sigma(torch.rand(B, L - 1, generator=g), how, shift))     # every latent has a noise level of its own
    eps = to(torch.randn(B, C, L - 1, h, w, generator=g))
    history = to(corrupt * torch.rand(B, 1, generator=g)).expand(B, L)
    clean = add_noise(z, to(torch.randn(B, C, L, h, w, generator=g)), history)
    target = z[:, :, 1:]
    text, _, pooled = model.encode_text(words)
    v_hat = model.forward_teacher_forced(clean, add_noise(target, eps, sigma), sigma, text, pooled, None if deaf else model.encode_audio(sound))
    weight = motion_weight(z, lam, skip=2)[:, :, 1:]
    return flow_loss(v_hat, velocity(target, eps), sigma, weight)


# ------------------------------------------------------------------------------------------------ two streams (SyncFlow)

def ot_permutation(noise, data):
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


def syncflow_loss(net, z_v, z_a, words, g, stage="joint", ot=False, how="uniform", shift=1.):
    """SyncFlow's objective: rectified flow on both streams with one clock -> loss, report (video, audio).

    z_v (B, C, L, h, w), z_a (B, A, S) normalised latents; words as `DualTower.encode_text` takes them; g: a CPU generator. stage 'video':
    the video stream alone; 'audio': the loss is audio's alone, on video features at the same noise level; 'joint': both."""
    to = lambda t: t.to(z_v.device)
    sigma = to(sample_sigma(torch.rand(len(z_v), generator=g), how, shift))     # (B,): tau = 1 - sigma in the paper
    eps_v, eps_a = to(torch.randn(z_v.shape, generator=g)), to(torch.randn(z_a.shape, generator=g))
    if ot:
        order = ot_permutation([eps_v, eps_a], [z_v, z_a])
        eps_v, eps_a = eps_v[order], eps_a[order]
    x_v = add_noise(z_v, eps_v, sigma[:, None])
    x_a = add_noise(z_a[..., None, None], eps_a[..., None, None], sigma[:, None])[..., 0, 0]
    v_v, v_a = net(None if net.cfg.blind else x_v, None if stage == "video" else x_a, sigma, *net.encode_text(words))
    error_v, error_a = (z_v.new_zeros(()) if v is None else (v.float() - velocity(z, eps)).square().mean()
                        for v, z, eps in ((v_v, z_v, eps_v), (v_a, z_a, eps_a)))
    loss = dict(video=error_v, audio=error_a, joint=error_v + error_a)[stage]
    return loss, torch.stack([error_v.detach(), error_a.detach()])


def image_loss(net, z, words, g, how="uniform", shift=1.):
    """Rectified flow on single pictures, the first latents z (B, C, 1, h, w) of clips -> loss. Most of what a text-to-video tower has to learn is how
    things look, and that every clip shows only once: Open-Sora's, which SyncFlow starts from, had seen images first."""
    sigma = sample_sigma(torch.rand(len(z), generator=g), how, shift).to(z.device)
    eps = torch.randn(z.shape, generator=g).to(z.device)
    v = net(add_noise(z, eps, sigma[:, None]), None, sigma, *net.encode_text(words))[0]
    return (v.float() - velocity(z, eps)).square().mean()


# ------------------------------------------------------------------------------------------------ cross-task synergy (Harmony)

def harmony_loss(net, z_v, z_a, words, g, ref=None, ref_mask=None, stage="joint", lam_v=.1, lam_a=.3, shift=5., how="uniform", begun=.5, lam_joint=1.):
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
    sigma = to(sample_sigma(torch.rand(len(z_v), generator=g), how, shift))     # (B,)
    eps_v, eps_a = to(torch.randn(z_v.shape, generator=g)), to(torch.randn(z_a.shape, generator=g))
    sigma_v = sigma[:, None].repeat(1, z_v.shape[2])                          # (B, L)
    sigma_v[:, 0] *= to(torch.rand(len(z_v), generator=g) >= begun)           # a picture to begin with
    x_v, x_a = add_noise(z_v, eps_v, sigma_v), add_noise(z_a[..., None, None], eps_a[..., None, None], sigma[:, None])[..., 0, 0]
    clean, none, made = torch.zeros_like(sigma), z_v.new_zeros(()), (sigma_v > 0).float()
    video_error = lambda v: ((v.float() - velocity(z_v, eps_v)).square().mean((1, 3, 4)) * made).sum() / made.sum()
    audio_error = lambda v: (v.float() - velocity(z_a, eps_a)).square().mean()
    if stage == "video":
        loss = video_error(net.forward_joint(x_v, None, sigma_v, None, *words)[0])
        return loss, torch.stack([loss.detach(), none, none, none])
    if stage != "joint":
        loss = audio_error(net.forward_joint(None, x_a, None, sigma, *words, ref, ref_mask)[1])
        return loss, torch.stack([none, loss.detach(), none, none])
    joint_v = joint_a = none
    if lam_joint:
        v_v, v_a = net.forward_joint(x_v, x_a, sigma_v, sigma, *words, ref, ref_mask)
        joint_v, joint_a = video_error(v_v), audio_error(v_a)                 # eq. 4: L_joint is their sum
    driven_v = video_error(net.forward_joint(x_v, z_a, sigma_v, clean, *words, ref, ref_mask)[0]) if lam_v else none         # by clean audio
    driven_a = audio_error(net.forward_joint(z_v, x_a, clean, sigma, *words, ref, ref_mask)[1]) if lam_a else none         # by clean video
    loss = lam_joint * (joint_v + joint_a) + lam_v * driven_v + lam_a * driven_a                  # eq. 3
    return loss, torch.stack([t.detach() for t in (joint_v, joint_a, driven_v, driven_a)])

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


def a2v_loss(model, z, letters, mel, g, lam=1., skip_audio=.1, drop_text=.1, how="uniform", shift=4., corrupt=.2):
    """Syncphony's training objective in the parallel layout -> loss, report of four noise buckets.

    z (B, C, L, h, w) normalised latents, letters (B, T) and mel (B, 2S, 64) of the same clips, g: a CPU generator from
    which everything random is drawn. The context is lightly noised, and the network is not told: in a roll-out it will
    stand on its own small errors. Audio is never dropped (silence is information), but for a few batches the audio LAYERS
    are skipped: guidance will run that path, and without a pretrained backbone it would be one the network never took."""
    B, C, L, h, w = z.shape
    to = lambda t: t.to(z.device)
    sigma = to(draw_sigma(torch.rand(B, L - 1, generator=g), how, shift))     # every latent has a noise level of its own
    eps = to(torch.randn(B, C, L - 1, h, w, generator=g))
    history = to(corrupt * torch.rand(B, 1, generator=g)).expand(B, L)
    clean = add_noise(z, to(torch.randn(B, C, L, h, w, generator=g)), history)
    letters = letters * to((torch.rand(B, 1, generator=g) >= drop_text).long())            # '' is the null text
    deaf = torch.rand((), generator=g).item() < skip_audio
    target = z[:, :, 1:]
    text, pooled = model.text(letters)
    v_hat = model.parallel(clean, add_noise(target, eps, sigma), sigma, text, pooled, None if deaf else model.ears(mel))
    weight = motion_weight(z, lam, skip=2)[:, :, 1:]
    return flow_loss(v_hat, velocity(target, eps), sigma, weight)

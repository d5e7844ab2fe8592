"""Rectified flow, guidance and the objectives of three papers: Syncphony, SyncFlow, Harmony.

    clean z, sigma = 0                                                      noise eps, sigma = 1
           o---------------------------------x-------------------------------------o
                          x = (1 - sigma) z + sigma eps
                          v = dx / dsigma = eps - z            is what the networks predict
                          z = x - sigma v                      is what a prediction says about z

Training   draw sigma and eps, form x, predict v, take the squared error: `*_loss` below.
Sampling   walk from sigma = 1 to 0 with Euler steps, x <- x + (sigma_next - sigma) v (sample.py).
Guidance   has one form for every rule of the three papers. S = 1 switches a term off:

               v = v_pos + sum_k (S_k - 1) (v_pos - v_neg_k)

           paper                        negative prediction                 S
           Syncphony eqs. 2, 6 (ASG)    audio layers skipped                1 + w_a
           Syncphony eqs. 5, 6 (CFG)    empty caption (on Pyramid Flow      1 + w_t
                                        a prompt of flaws)
           SyncFlow eq. 3 (CFG)         empty caption                       w
           Harmony eqs. 9, 10           the other stream silent / static    s_v, s_a

SyncFlow's time is t = 1 - sigma, its velocity -v: the sign of v changes in every term alike.
Pyramid Flow's path in stages is in pyramid.py.

    B batch · C video channels · L latents · h w latent grid · A audio channels · S audio steps
    z latents, normalised to unit variance · eps noise · sigma (B,) or (B, L): one noise level per
    sample or per latent frame · generators: B CPU generators, the source of all randomness
"""
import torch

BUCKETS = 4                       # the error is reported for four equal ranges of sigma
CONTEXT_NOISE = .2                # largest sigma of a context; not tuned (Pyramid Flow: 1/3)


# ----------------------------------------------------------------------------------------- the path

def expand_sigma(sigma, z):
    """View sigma (B,) or (B, L) so that it multiplies z (B, C, ...) or (B, C, L, ...)."""
    # One more axis for the channels, then axes of size 1 up to the number of dimensions of z.
    shape = [sigma.shape[0], 1, *sigma.shape[1:]]                       # (B, 1) or (B, 1, L)
    return sigma.reshape(shape + [1] * (z.dim() - len(shape)))


def add_noise(z, eps, sigma):
    """x on the straight line between z (sigma = 0) and eps (sigma = 1); z, eps, x of one shape."""
    sigma = expand_sigma(sigma, z)
    return (1 - sigma) * z + sigma * eps


def velocity(z, eps):
    """The derivative of the path by sigma: the same everywhere on the line."""
    return eps - z


def shift_sigma(sigma, k):
    """Move noise levels towards 1 (k > 1): s' = k s / (1 + (k - 1) s). Keeps 0 and 1; k = 1 is off.

    Which motion belongs to a sound is decided near sigma = 1. At sigma = 0.5 a moving latent
    already shows through the noise, and only denoising is left to learn. Measured on the toybox
    after 400 steps (one seed): error of z at sigma = 1 is 0.51 with k = 1, 0.35 with k = 4.
    """
    return k * sigma / (1 + (k - 1) * sigma)


def sample_sigma(u, sigma_dist="uniform", shift=1.):
    """Training noise levels from u ~ U(0, 1) of any shape, by 'uniform' or 'logit-normal' (SD3)."""
    if sigma_dist == "logit-normal":
        # The inverse normal CDF makes u a standard normal; its sigmoid favours the middle of the
        # path. The clamp keeps u = 0 and 1 finite.
        u = torch.special.ndtri(u.clamp(1e-5, 1 - 1e-5)).sigmoid()
    return shift_sigma(u, shift)


# ------------------------------------------------------------------------------ errors and guidance

def motion_weight(z, lambda_motion=1., skip=1):
    """Syncphony eq. 1 as a weight on the squared error: 1 + lambda m^2, m_l = z_l - z_(l-1).

    Most of a clip is at rest, and unweighted, what rests would be most of the loss.

    z (B, C, L, h, w) -> weight of the same shape, without gradient. Eq. 1 weighs the error of z,
    z^ - z = -sigma (v^ - v). Its square is sigma^2 |v^ - v|^2; sigma^2 is the same for all values
    of a latent and is left out, as always in a loss of v; the weight stays. The first `skip`
    latents get m = 0: latent 0 has no predecessor.
    """
    # A target must not be moved to lower its own weight: no gradient. Not in the paper: |m| is
    # clipped at 1.5 standard deviations. Real latents have heavy tails: unclipped, a few values
    # with m^2 in the hundreds make up the loss.
    motion = (z[:, :, 1:] - z[:, :, :-1]).detach().clamp(-1.5, 1.5)     # (B, C, L-1, h, w)
    motion = torch.cat([torch.zeros_like(z[:, :, :1]), motion], 2)      # (B, C, L, h, w)
    motion[:, :, :skip] = 0
    return 1 + lambda_motion * motion.square()                          # Syncphony eq. 1


def flow_loss(v_hat, v, sigma, weight=None):
    """Weighted mean squared error of the velocity -> loss, report of four ranges of sigma.

    v_hat, v, weight (B, C, L, h, w), sigma (B, L). The report (4,) is the unweighted error; nan
    for a range that no latent of the batch fell into.
    """
    # In float32 also under autocast.
    error = (v_hat.float() - v).square()                                # (B, C, L, h, w)
    loss = error.mean() if weight is None else (error * weight).mean()

    # Mean error in each range of sigma. Masks and sums: with boolean indexing the CPU would wait
    # until the GPU knows the size of the result.
    per_latent = error.detach().mean((1, 3, 4))                         # (B, L)
    bucket = (sigma * BUCKETS).long().clamp(max=BUCKETS - 1)            # (B, L), 0..3
    inside = bucket == torch.arange(BUCKETS, device=sigma.device)[:, None, None]    # (4, B, L)
    report = torch.where(inside, per_latent, 0).sum((1, 2)) / inside.sum((1, 2))
    return loss, report


def mean_error(v_hat, z, eps, sigma=None):
    """Mean squared error of a stream's velocity. With sigma (B, L) only latents at sigma > 0 count:
    the others are given to the network, so their velocity is of no interest."""
    error = (v_hat.float() - velocity(z, eps)).square()                 # like z
    if sigma is None:
        return error.mean()
    # Every sample has the same weight, however many of its latents count, so that the mean over
    # micro-batches is the mean over the batch.
    is_noisy = (sigma > 0).float()                                      # (B, L)
    per_sample = (error.mean((1, 3, 4)) * is_noisy).sum(1)             # (B,)
    # (In one clip of 2^24 torch.rand gives a sigma of 0: no latent counts, and 0 / 0 is nan.)
    return (per_sample / is_noisy.sum(1).clamp(min=1)).mean()


def combine_guidance(v_pos, *terms):
    """v_pos + sum (S - 1)(v_pos - v_neg) over terms (S, v_neg). Where S is 1, v_neg may be None."""
    v = v_pos
    for scale, v_neg in terms:
        if scale != 1:
            # Syncphony eqs. 2, 5, 6; SyncFlow eq. 3; Harmony eqs. 9, 10
            v = v + (scale - 1) * (v_pos - v_neg)
    return v


# -------------------------------------------------------------------------------------------- noise

def to_device(x, device):
    """x on a device; from CPU to GPU a copy for which the CPU does not wait. From pinned memory the
    GPU copies by itself, in its queue; from other memory the CPU waits for that queue."""
    from_cpu_to_gpu = torch.device(device).type == "cuda" and x.device.type == "cpu"
    # torch.compile cannot trace pinning.
    if from_cpu_to_gpu and not torch.compiler.is_compiling():
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def randn_each(generators, shape, device="cpu"):
    """Normal noise (B, *shape), row b from generators[b]: the noise of a sample does not depend on
    the batch, micro-batch or process that it is in, or on the device. Networks round differently
    there: the same noise, and results that are alike to rounding."""
    return to_device(torch.stack([torch.randn(shape, generator=g) for g in generators]), device)


def rand_each(generators, shape=()):
    """The same, uniform in [0, 1), on the CPU: (B, *shape)."""
    return torch.stack([torch.rand(shape, generator=g) for g in generators])


# ---------------------------------------------------------------------------------------- Syncphony

def syncphony_loss(model, z, text_inputs, audio_inputs, generators, skip_audio=False,
                   lambda_motion=1., sigma_dist="uniform", shift=4.):
    """Syncphony's objective, with teacher forcing -> loss, report.

    Every latent of a clip but the first is a target, given the clean latents before it.
    z (B, C, L, h, w); text_inputs and audio_inputs as `MMDiT.encode_text` and `MMDiT.encode_audio`
    take them.

    skip_audio: skip the audio layers. Guidance evaluates this path (eq. 2): the paper's pretrained
    backbone knows it "without additional training" (section 3.3), one trained from scratch has to
    meet it in training. Audio itself is never dropped: silence is information
    (Syncphony appendix B.1).
    """
    B, C, L, h, w = z.shape
    # The targets are latents 1 .. L-1, each at a noise level of its own, as in Diffusion Forcing.
    u = rand_each(generators, (L - 1,))
    sigma = to_device(sample_sigma(u, sigma_dist, shift), z.device)     # (B, L-1)
    eps = randn_each(generators, (C, L - 1, h, w), z.device)
    target = z[:, :, 1:]
    noisy = add_noise(target, eps, sigma)                               # (B, C, L-1, h, w)

    # Context noise augmentation: one small level per clip, unknown to the network. In sampling the
    # latents before a target carry its own errors (exposure bias).
    context_noise = CONTEXT_NOISE * to_device(rand_each(generators, (1,)), z.device)
    context_eps = randn_each(generators, (C, L, h, w), z.device)
    context = add_noise(z, context_eps, context_noise.expand(B, L))     # (B, C, L, h, w)

    # One pass predicts all targets. Target l attends to the context before it, never to itself
    # without noise (`teacher_forcing_mask`).
    text, _, pooled = model.encode_text(text_inputs)
    audio = None if skip_audio else model.encode_audio(audio_inputs)
    v_hat = model.forward_teacher_forced(context, noisy, sigma, text, pooled, audio)

    # skip=2: latent 0 holds one frame, the others t frames, so the difference between latents 0
    # and 1 is not motion. The paper does not make this exception.
    weight = motion_weight(z, lambda_motion, skip=2)[:, :, 1:]
    return flow_loss(v_hat, velocity(target, eps), sigma, weight)


# ----------------------------------------------------------------------------------------- SyncFlow

def ot_permutation(noise, data):
    """Minibatch optimal transport (Tong et al. 2024): which noise to pair with which sample.

    noise, data (B, ...), or lists of such for several streams, whose costs (squared distance
    divided by size) add up to one common pairing -> order (B,): noise[order] belongs to data. The
    assignment is exact and uses every noise once; captions stay with their clips.

    Off by default: in thousands of dimensions the noises of a batch of 16 are about equally far
    (the cost falls by 2-4 %), and pairing across captions biases a conditional flow.
    """
    from scipy.optimize import linear_sum_assignment                    # comes with librosa
    if not isinstance(noise, (list, tuple)):
        noise, data = [noise], [data]
    # cost[i, j]: squared distance of noise i and sample j per value, summed over the streams.
    cost = 0.
    for eps, z in zip(noise, data):
        # On the CPU, because a Mac's GPU has no float64, and the solver needs it there.
        eps = eps.flatten(1).cpu().double()
        distance = torch.cdist(eps, z.flatten(1).cpu().double())        # (B, B)
        cost = cost + distance.square() / eps[0].numel()
    # columns[i] is the sample of noise i; argsort inverts this permutation.
    _, columns = linear_sum_assignment(cost.numpy())
    return torch.as_tensor(columns).argsort()


def syncflow_loss(model, z_v, z_a, text_inputs, generators, stage="joint", ot=False,
                  sigma_dist="uniform", shift=1.):
    """SyncFlow's objective: both streams at ONE noise level -> loss, report (video, audio).

    z_v (B, C, L, h, w), z_a (B, A, S); text_inputs as `DualTower.encode_text` takes them. The
    report is nan for a stream that is absent. The stages of SyncFlow section 3.2:

    stage    video stream      audio stream      loss
    video    noisy, sigma      absent            video error: the video tower is trained alone
    audio    noisy, sigma      noisy, sigma      audio error: the video tower is frozen
    joint    noisy, sigma      noisy, sigma      video error + audio error
    """
    # Which streams there are; audio_only: the ablation without video.
    has_v = not model.cfg.audio_only
    has_a = stage != "video"
    # One noise level for both streams (the paper's t is 1 - sigma), and one optimal pairing.
    sigma = to_device(sample_sigma(rand_each(generators), sigma_dist, shift), z_v.device)   # (B,)
    eps_v = randn_each(generators, z_v.shape[1:], z_v.device)
    eps_a = randn_each(generators, z_a.shape[1:], z_a.device)
    # (FLOPs are counted on the meta device, which has no numbers to pair.)
    if ot and not z_v.is_meta:
        noise = [eps_v] * has_v + [eps_a] * has_a
        order = ot_permutation(noise, [z_v] * has_v + [z_a] * has_a)
        eps_v = eps_v[order]
        eps_a = eps_a[order]

    # An absent stream is None, and so is its prediction.
    x_v = add_noise(z_v, eps_v, sigma) if has_v else None
    x_a = add_noise(z_a, eps_a, sigma) if has_a else None
    v_v, v_a = model(x_v, x_a, sigma, sigma, *model.encode_text(text_inputs))   # SyncFlow eq. 2

    # Section 3.2's L_fm, of the streams that the stage trains. Each error is a mean over its own
    # stream; the paper does not say how the two are weighed.
    absent = z_v.new_full((), torch.nan)
    error_v = absent if v_v is None else mean_error(v_v, z_v, eps_v)
    error_a = absent if v_a is None else mean_error(v_a, z_a, eps_a)
    loss = dict(video=error_v, audio=error_a, joint=error_v + error_a)[stage]
    return loss, torch.stack([error_v, error_a]).detach()


def image_loss(model, z, text_inputs, generators, sigma_dist="uniform", shift=1.):
    """Rectified flow on still images, the first latents z (B n, C, 1, h, w) of n clips for each of
    the B samples -> loss.

    Most of what a text-to-video tower has to learn is appearance, of which a clip gives one
    example. Open-Sora, from which SyncFlow starts, was trained on images first.
    """
    n = len(z) // len(generators)
    u = rand_each(generators, (n,)).flatten()
    sigma = to_device(sample_sigma(u, sigma_dist, shift), z.device)     # (B n,)
    eps = randn_each(generators, (n, *z.shape[1:]), z.device).flatten(0, 1)
    # The video tower alone: no audio stream.
    v, _ = model(add_noise(z, eps, sigma), None, sigma, None, *model.encode_text(text_inputs))
    return mean_error(v, z, eps)


# ------------------------------------------------------------------------------------------ Harmony

def harmony_loss(model, z_v, z_a, text_inputs, transcripts, generators, ref=None, ref_mask=None,
                 stage="joint", lambda_joint=1., lambda_v=.1, lambda_a=.3, shift=5.,
                 sigma_dist="uniform", p_first_frame=.5):
    """Harmony's cross-task synergy, one joint and two driven tasks -> loss, report: errors of
    joint video, joint audio, audio-driven, video-driven, nan for one that is not computed.

        L = lambda_joint L_joint + lambda_v L_driven^audio + lambda_a L_driven^video        eq. 3

        forward         video            audio            error of     weight               eq. 4
        joint           noisy            noisy            both         lambda_joint = 1
        audio-driven    noisy            clean            video        lambda_v = .1
        video-driven    clean            noisy            audio        lambda_a = .3

    noisy: at the clip's sigma, a given first frame at 0; clean: at 0. With lambda_v = lambda_a = 0
    this is eq. 1. lambda_v and lambda_a name the stream that is TRAINED. Beside a clean stream the
    correspondence is learned from the first steps, between two noisy ones only late (figure 3).

    z_v (B, C, L, h, w), z_a (B, A, S); text_inputs, transcripts as `DualTower.encode_audio_text`
    takes them; ref (B, A, R), mask (B, R): clean references of the timbre. Stages 'video', 'audio',
    'timbre' train one stream; the last two differ in where train.py takes references from. shift
    of noise levels: the paper's. p_first_frame: share of clips with a given latent 0."""
    # One noise and one noise level per clip, which all forwards share.
    sigma = to_device(sample_sigma(rand_each(generators), sigma_dist, shift), z_v.device)   # (B,)
    eps_v = randn_each(generators, z_v.shape[1:], z_v.device)
    eps_a = randn_each(generators, z_a.shape[1:], z_a.device)
    # The video has a level per latent: 0 for a latent 0 that is given.
    given = to_device(rand_each(generators) < p_first_frame, z_v.device)        # (B,)
    sigma_v = sigma[:, None].repeat(1, z_v.shape[2])                    # (B, L)
    sigma_v[:, 0] = sigma_v[:, 0] * ~given
    x_v = add_noise(z_v, eps_v, sigma_v)
    x_a = add_noise(z_a, eps_a, sigma)

    # The caption for the video tower; [transcript; caption] for the audio tower.
    text = model.encode_text(text_inputs)
    if stage != "video":
        text = (*text, *model.encode_audio_text(text_inputs, transcripts))
    joint_v = joint_a = driven_v = driven_a = z_v.new_full((), torch.nan)
    loss = z_v.new_zeros(())
    if stage == "video":
        v_v, _ = model(x_v, None, sigma_v, None, *text)
        loss = joint_v = mean_error(v_v, z_v, eps_v, sigma_v)
    elif stage != "joint":
        _, v_a = model(None, x_a, None, sigma, *text, ref, ref_mask)
        loss = joint_a = mean_error(v_a, z_a, eps_a)
    else:
        # The three forwards of the table, a given stream at sigma = 0. A weight of 0 saves one.
        if lambda_joint:
            v_v, v_a = model(x_v, x_a, sigma_v, sigma, *text, ref, ref_mask)
            joint_v = mean_error(v_v, z_v, eps_v, sigma_v)
            joint_a = mean_error(v_a, z_a, eps_a)
            loss = loss + lambda_joint * (joint_v + joint_a)            # eqs. 3, 4: L_joint
        if lambda_v:
            v_v, _ = model(x_v, z_a, sigma_v, 0 * sigma, *text, ref, ref_mask)
            driven_v = mean_error(v_v, z_v, eps_v, sigma_v)
            loss = loss + lambda_v * driven_v                           # L_driven^audio
        if lambda_a:
            _, v_a = model(z_v, x_a, 0 * sigma, sigma, *text, ref, ref_mask)
            driven_a = mean_error(v_a, z_a, eps_a)
            loss = loss + lambda_a * driven_a                           # L_driven^video
    return loss, torch.stack([joint_v, joint_a, driven_v, driven_a]).detach()

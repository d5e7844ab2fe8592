"""Everything Pyramid Flow: the staged path, its loss and its sampler, the published weights and encoders."""
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import BadInput, temp_path
from losses import add_noise, combine_guidance, flow_loss, motion_weight, rand_each, randn_each, shift_sigma
from model import AudioCrossAttention, MelEncoder, MMDiT, MMDiTConfig, init_weights
from vae import CausalVideoVAE, VAEConfig

GAMMA = 1 / 3                                                                 # correlation of the repairing noise in a block: -gamma
QUALITY_SUFFIX = ", hyper quality, Ultra HD, 8K"                                        # Pyramid Flow adds this to every prompt


# ------------------------------------------------------------------------------------------------ the staged path of Pyramid Flow

def make_stages(n=3, shift=1.):
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


def downsample2(z):                                                                 # (B, C, L, h, w) -> half the side, 2x2 means
    return torch.nn.functional.avg_pool3d(z, (1, 2, 2))


def upsample2(z):
    return z.repeat_interleave(2, -1).repeat_interleave(2, -2)


def latent_pyramid(z, n=3):
    """Latents at n resolutions, coarsest first."""
    out = [z]
    for _ in range(n - 1):
        out.insert(0, downsample2(out[0]))
    return out


def noise_pyramid(eps, n=3):
    """The same for noise: a mean of four has half the deviation, so it is doubled, and stays N(0, 1)."""
    out = [eps]
    for _ in range(n - 1):
        out.insert(0, 2 * downsample2(out[0]))
    return out


def block_noise(shape, g=None):
    """b: unit variance, correlation -1/3 within each 2x2 block, which therefore sums to zero. (B, C, L, h, w)

    N(0, 1) minus the mean of its block has variance 3/4 and covariance -1/4: times (4/3)^(1/2) it is b, exactly."""
    x = torch.randn(shape, generator=g)
    return (4 / 3) ** .5 * (x - upsample2(downsample2(x)))


def pyramid_history(z_levels, u, s):
    """What the latent number u sees of those before it while it is made at level s, oldest first: the last one as sharp as
    itself, every earlier one a level coarser, and all the rest at the coarsest. -> list of (B, C, L_k, h_k, w_k)"""
    clips, l = [], u
    for level in range(s, 0, -1) or (0,):
        if l > 0:
            l -= 1
            clips.insert(0, z_levels[level][:, :, l:l + 1])
    return ([z_levels[0][:, :, :l]] if l > 0 else []) + clips


def stage_endpoints(z_levels, eps_levels, piece, s):
    """The straight line of stage s, from its noisy start to its less noisy end, with the SAME noise in both -> start, end."""
    z, eps = z_levels[s], eps_levels[s]
    start = eps if s == 0 else piece["start"] * eps + (1 - piece["start"]) * upsample2(z_levels[s - 1])
    end = z if piece["end"] == 0 else piece["end"] * eps + (1 - piece["end"]) * z
    return start, end


def pyramid_loss(model, z, words, sound, numbers, generators, u_fine, deaf=False, lam=1., corrupt=1 / 3, columns=(0, 1, 1, 2)):
    """Syncphony's objective in Pyramid Flow's own layout: of every clip ONE latent, at one stage -> loss, report of the stages.

    z (B, C, L, h, w) normalised latents, words, sound, generators and deaf as in `syncphony_loss`. Clip number r of the whole batch, of which these
    are the `numbers`, trains stage columns[r mod 4]. Coarse stages are cheap, so where the fine stage stands late in a clip and sees a long history, they
    stand early, and the other way round: u_fine (1 .. L-1, common to the batch), L - u_fine coarse. The history is noised by c <= `corrupt`, untold.
    Eq. 1 speaks of the difference of neighbouring latents: here of the clean ones at the resolution of the stage."""
    B, _, L = z.shape[:3]
    to, n = lambda t: t.to(z.device), max(columns) + 1
    (text, mask, pooled), audio = model.encode_text(words), None if deaf else model.encode_audio(sound)
    losses, report = [], torch.full((n,), float("nan"), device=z.device)
    for s, piece in enumerate(make_stages(n)):
        rows = torch.tensor([i for i, r in enumerate(numbers) if columns[r % len(columns)] == s], dtype=torch.long)
        if len(rows) == 0:
            continue
        some = [generators[i] for i in rows]
        u, z_levels = u_fine if s == n - 1 else L - u_fine, latent_pyramid(z[rows], n)
        now = [zk[:, :, u:u + 1] for zk in z_levels]
        eps = noise_pyramid(to(randn_each(some, now[-1].shape[1:])), n)
        c = to(corrupt * rand_each(some, (1,)))
        before = [add_noise(h, to(randn_each(some, h.shape[1:])), c.expand(-1, h.shape[2])) for h in pyramid_history(z_levels, u, s)]
        i = to((1000 * rand_each(some, (1,))).long())
        (start, end), sigma, (hi, lo) = stage_endpoints(now, eps, piece, s), 1 - i / 1000, piece["times"]
        v_hat = model([*before, add_noise(end, start, sigma)], (hi + (lo - hi) * i / 1000)[:, 0], text[rows], mask[rows], pooled[rows],
                      None if deaf else audio[rows])
        weight = motion_weight(z_levels[s][:, :, u - 1:u + 1], lam, skip=2 if u == 1 else 1)[:, :, 1:]
        loss, _ = flow_loss(v_hat, start - end, sigma, weight)
        report[s] = (v_hat.detach().float() - (start - end)).square().mean()
        losses.append(loss * len(rows))
    return sum(losses) / B, report


def sample_pyramid(call, z0, latents, noise, steps=(10, 10, 10), cfg=3., first=None, jump=block_noise, keep=30, bar=None):
    """Generate latents as Pyramid Flow does: each from coarse to fine, within sight of ever coarser earlier ones. Yields them.

    call(clips, t, S, gone) -> velocity (B, C, 1, h, w), guided with text scale S, see `guided`; clips have B rows.
    z0: the first latent (B, C, 1, h, w), normalised, or None: then it is made too, with (steps, scale) of its own, `first`.
    noise (B, C, >= latents to make, h, w): N(0, 1) at full resolution; its coarse levels begin the coarse pieces.
    jump(shape) -> the noise that repairs a doubling (`losses.block_noise`). The first latent and the last
    `keep` are looked back on, so memory stays bounded."""
    pieces, done = make_stages(len(steps)), [] if z0 is None else [z0]
    for number in range(len(done), latents):
        u = len(done)
        n_steps, S = first if first and u == 0 else (steps, 1 + cfg)
        before = latent_pyramid(torch.cat(done, 2), len(steps)) if done else None     # all earlier latents, coarsest first
        x = noise_pyramid(noise[:, :, number - (z0 is not None):][:, :, :1], len(steps))[0]
        for s, (piece, n) in enumerate(zip(pieces, n_steps)):
            if s:                                                             # to the next resolution, and its noise level
                x = upsample2(x)
                x = piece["alpha"] * x + piece["beta"] * jump(x.shape).to(x)
            context = pyramid_history(before, u, s) if done else []
            times, sigmas = sampling_grid(piece, n)
            for t, a, b in zip(times.tolist(), sigmas.tolist(), sigmas[1:].tolist()):
                x = x + (b - a) * call([*context, x], t, S, number - u).to(x) # Euler; v = start - end of this piece
                if bar is not None:
                    bar.update()
        done = done[:1] + done[1:][-(keep - 1):] + [x]
        yield x


def with_guidance(model, text, mask, pooled, audio=None, asg=0.):
    """A network of the published kind as `sample_pyramid` calls it. text (R·B, T, D), mask (R·B, T), pooled (R·B, P): for B
    clips their prompts and, where there is text guidance (R = 2), as many times the negative prompt. audio (B, S, A) or
    None; asg: w_a. All branches run in one batch."""
    def call(clips, t, S, gone=0):
        B = len(clips[-1])
        R = len(text) // B
        heard = None if audio is None else audio.repeat(R, 1, 1)
        v = model([c.repeat(R, 1, 1, 1, 1) for c in clips], torch.full((R * B,), t, device=text.device), text, mask, pooled, heard,
                  B if asg > 0 and audio is not None else 0, gone)
        return combine_guidance(v[:B], (1 + asg if audio is not None else 1, v[-B:]), (S if R > 1 else 1, v[B:2 * B]))                # Syncphony eq. 6
    return call


# ------------------------------------------------------------------------------------------------ published weights

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}


def read_safetensors(path):
    """A .safetensors file -> name: tensor, each a mapped stretch of the file: nothing is read before it is used, and what is
    dropped gives its memory back.

    The format is 8 bytes, the length n of the header; n bytes of JSON, {name: {dtype, shape, data_offsets}}; the numbers."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        try:
            header = json.loads(f.read(n)) if 8 + n <= size else {}
        except ValueError:
            header = {}
    header.pop("__metadata__", None)
    if not header or 8 + n + max(t["data_offsets"][1] for t in header.values()) > size:
        raise BadInput(f"{path}: not a whole .safetensors file ({size} bytes); it was cut short or is something else: download it again")
    state = {}
    for name, t in header.items():
        a, b = (8 + n + offset for offset in t["data_offsets"])
        piece = torch.from_numpy(np.memmap(path, np.uint8, "c", a, b - a))    # "c": changes stay in memory
        piece = piece if a % 8 == 0 else piece.clone()                        # views of wider types must be aligned
        state[name] = piece.view(_DTYPES[t["dtype"]]).view(t["shape"])
    return state


def read_published(folder, name="diffusion_pytorch_model"):
    """A folder as model hubs hold them: config.json beside one .safetensors, several with an index, or a .bin
    -> config, state dict. Prefixes of training checkpoints (dit., vae.) are dropped, and what is no weight of the model."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder}: no config.json in it; give the folder that holds config.json and {name}.safetensors")
    index, whole, old = folder / f"{name}.safetensors.index.json", folder / f"{name}.safetensors", folder / f"{name}.bin"
    try:
        config = json.loads((folder / "config.json").read_text())
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
    except (ValueError, KeyError) as why:
        raise BadInput(f"{folder}: config.json or the index of its shards cannot be read ({why}); download it again") from None
    files = [folder / s for s in shards] or [p for p in (whole, old) if p.is_file()][:1]
    gone = [p.name for p in files if not p.is_file()] if files else [whole.name]
    if gone:
        raise BadInput(f"{folder}: {', '.join(gone)} is missing; download the folder again")
    state = {}
    for path in files:
        if path.suffix == ".bin":
            try:
                state.update(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
            except Exception as why:                                          # torch raises half a dozen kinds here
                raise BadInput(f"{path}: cannot be loaded safely ({type(why).__name__}); it is damaged or no file of weights") from None
        else:
            state.update(read_safetensors(path))
    if any("lora" in k.lower() for k in state):
        raise BadInput(f"{folder}: a LoRA file, which holds changes to a model; give the folder of the model itself")
    return config, {k.removeprefix("dit.").removeprefix("vae."): v for k, v in state.items() if not k.startswith("loss.")}


def load_published_state(model, state, where, device="cpu", dtype=None, fresh=()):
    """Put published weights into a model made on the meta device, in `dtype` (None: their own). Parameters whose name holds one
    of `fresh` may be missing. Every name or shape that does not fit is named, in one line."""
    wanted, here = model.state_dict(), {}
    missing = [k for k in wanted if k not in state and not any(f in k for f in fresh)]
    unexpected = [k for k in state if k not in wanted]
    odd = [f"{k} {tuple(state[k].shape)}, not {tuple(v.shape)}" for k, v in wanted.items() if k in state and state[k].shape != v.shape]
    if missing or unexpected or odd:
        parts = [f"{len(names)} {word}: {', '.join(names)}" for word, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", odd)) if names]
        raise BadInput(f"{where}: its weights are not those of this model. {'; '.join(parts)}")
    for k in [k for k in wanted if k in state]:
        here[k] = state.pop(k).to(device, dtype)
    model.load_state_dict(here, strict=False, assign=True)
    return model


def load_pyramid_flow(folder, device="cpu", dtype=None, **changes):
    """Pyramid Flow's published weights (rain1011/pyramid-flow-miniflux, diffusion_transformer_384p). The file is mapped, not
    read; with dtype=None it is used where it lies. `changes`: fields of the configuration that the file does not know, such
    as audio_dim=1024: these layers are new, and unheard, so the result IS the published model until they are trained."""
    config, state = read_published(folder)
    if not any(k.startswith("single_transformer_blocks") for k in state):
        raise BadInput(f"{folder}: no single-stream blocks in it; the older SD3-based Pyramid Flow is another network: give a miniFLUX folder")
    try:
        cfg = MMDiTConfig(n_double=config["num_layers"], n_single=config["num_single_layers"], heads=config["num_attention_heads"],
                          head_dim=config["attention_head_dim"], axes=tuple(config["axes_dims_rope"]), latent=config["in_channels"] // 4,
                          text_dim=config["joint_attention_dim"], pooled_dim=config["pooled_projection_dim"], **changes)
    except KeyError as why:
        raise BadInput(f"{folder}/config.json: no {why}; expected the configuration of a PyramidFluxTransformer") from None
    with torch.device("meta"):
        net = MMDiT(cfg)
    load_published_state(net, state, folder, device, dtype, fresh=(".audio.", "ears."))
    if cfg.audio_dim:
        for block in net.single_transformer_blocks:
            block.audio = init_weights(AudioCrossAttention(cfg.heads * cfg.head_dim, cfg.heads, cfg.audio_dim)).to(device, dtype)
        if cfg.audio == "mel":
            net.ears = MelEncoder(cfg.audio_dim).to(device, dtype)
    return net


def load_pyramid_vae(folder, device="cpu", dtype=None):
    """Pyramid Flow's published VAE (rain1011/pyramid-flow-miniflux, causal_video_vae), mapped as the transformer's file is."""
    config, state = read_published(folder)
    for new, old in zip(("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")):      # names before 2023
        state = {k.replace(f"attentions.0.{old}.", f"attentions.0.{new}."): v for k, v in state.items()}
    try:
        widths = tuple(config["encoder_block_out_channels"])
        flags = lambda key, default: tuple(int(f) for f in config.get(key, default))
        three = (1,) * (len(widths) - 1) + (0,)
        cfg = VAEConfig(widths=widths, latent=config["encoder_out_channels"], groups=config["encoder_norm_num_groups"],
                        layers=(config["encoder_layers_per_block"][0], config["decoder_layers_per_block"][0]),
                        space=flags("encoder_spatial_down_sample", three), time=flags("encoder_temporal_down_sample", three))
    except KeyError as why:
        raise BadInput(f"{folder}/config.json: no {why}; expected the configuration of a CausalVideoVAE") from None
    with torch.device("meta"):
        vae = CausalVideoVAE(cfg)
    state = {k: v[..., 0, 0] if "attentions" in k and v.dim() == 4 else v for k, v in state.items()}
    return load_published_state(vae, state, folder, device, dtype).eval()


def _optional(flag, build, name):
    """Build something that needs transformers, which is not required otherwise, from a folder or a name on the hub."""
    try:
        import transformers
    except ImportError:
        raise BadInput(f"{flag} needs a package that is not required otherwise: pip install transformers") from None
    try:
        return build(transformers)
    except (OSError, ValueError) as why:
        raise BadInput(f"{flag} {name}: {str(why).splitlines()[0]}") from None


def load_hubert(name, device):
    """-> a function from a waveform (samples,) at 16 kHz to HuBERT's last states (samples / 320, 1024): 50 Hz, as DenseAV has it."""
    net = _optional("--hubert", lambda t: t.HubertModel.from_pretrained(name), name).to(device).eval()

    @torch.no_grad()
    def features(wave):
        x = torch.from_numpy((wave - wave.mean()) / (wave.std() + 1e-7)).to(device)
        x = F.pad(x, (40, 40))                                                # a window of 400 every 320: centres at (i + 0.5) 20 ms
        with torch.autocast(device.type, enabled=False):
            return net(x[None]).last_hidden_state[0].cpu().numpy()
    return features


NEGATIVE_PROMPT = ("cartoon style, worst quality, low quality, blurry, absolute black, absolute white, low res, extra limbs, extra digits, "
            "misplaced objects, mutated anatomy, monochrome, horror")             # what Pyramid Flow is steered away from


def t5_clip_states(folder, captions, device):
    """What Pyramid Flow reads of captions: T5-XXL's states of 128 tokens and CLIP-L's pooled vector, by the encoders that lie in
    its folder -> states (n, 128, 4096) float16, mask (n, 128), pooled (n, 768). 11 GB on disk, needed once: then cached."""
    def build(t):
        parts = dict(clip=(t.CLIPTokenizer, t.CLIPTextModel, ""), t5=(t.T5TokenizerFast, t.T5EncoderModel, "_2"))
        return {k: (tok.from_pretrained(folder, subfolder=f"tokenizer{n}"), net.from_pretrained(folder, subfolder=f"text_encoder{n}", torch_dtype=torch.bfloat16))
                for k, (tok, net, n) in parts.items()}
    made, rows = _optional("--pretrained", build, folder), []
    with torch.no_grad():
        for caption in captions:
            short, long = (tok([caption], padding="max_length", max_length=n, truncation=True, return_tensors="pt") for (tok, _), n in zip(made.values(), (77, 128)))
            pooled = made["clip"][1].to(device)(short.input_ids.to(device)).pooler_output[0]
            states = made["t5"][1].to(device)(long.input_ids.to(device), attention_mask=long.attention_mask.to(device)).last_hidden_state[0]
            rows.append([t.float().cpu().numpy() for t in (states, long.attention_mask[0], pooled)])
    states, mask, pooled = (np.stack(column) for column in zip(*rows))
    return states.astype(np.float16), mask, pooled


def cached_text_states(folder, captions, pretrained, device):
    """The same, kept in a cache's folder: captions are few. -> dict: caption -> (states, mask, pooled) tensors; '' is the null text."""
    path, wanted = Path(folder) / "prompts.npz", sorted({"", NEGATIVE_PROMPT, *captions})
    if path.is_file():
        with np.load(path) as z:
            found = {name: z[name] for name in z.files}
        if set(wanted) <= set(found["captions"].tolist()):
            return {c: tuple(torch.from_numpy(found[k][i]).float() for k in ("states", "mask", "pooled")) for i, c in enumerate(found["captions"].tolist())}
    states, mask, pooled = t5_clip_states(pretrained, wanted, device)
    part = temp_path(path)
    np.savez(part, captions=np.array(wanted), states=states, mask=mask, pooled=pooled)
    os.replace(part, path)
    return cached_text_states(folder, captions, pretrained, device)

"""Write docs/families.md: every model family, and what `geofast doctor` says of it.

python tools/families_page.py          write it
It takes all that the families need (constraints-zoo.txt). The tests make every row and compare.
"""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import conftest  # noqa: E402, F401 - makes torchvision importable
import families as f  # noqa: E402

import geofast as gf  # noqa: E402

CHECKS = ("repeats", "batch", "padding", "hidden_states", "roles")
WORDS = ["w1 w2", "w3", "w4 w5 w6 w7"]
HEAD = """# Model families

Every row is a checkpoint that `gf.load` has loaded and `geofast doctor` examined; `python
tools/families_page.py` writes this page, and a test holds it to what the checks say now. `random`
weights: a tiny checkpoint of the family's configuration, saved with the processor class that it
really has. `real`: weights that somebody trained, as far as the package index has them; no other
has been tried with real weights here, and `geofast doctor MODEL` does it for yours. `repeats`: two
passes agree; `batch`: a batch gives what single inputs give; `padding`: left against right; `hidden
states`: hooks against the library's own; `roles`: tokens against what they depend on and the
processor's ids.

`pass`: equal; `note`: a known difference, by design of the model (transformers gives the last
hidden state of a language model after its final norm; texts padded on the left stand elsewhere than
alone, which is why geofast pads on the right; open_clip and timm return no hidden states, and tests
compare with their `forward_intermediates` instead); `-`: does not apply. Two rows, image and text,
where a model takes both.

| family | class | sites | input | weights | repeats | batch | padding | hidden states | roles |
|---|---|---|---|---|---|---|---|---|---|
"""
KNOWN_HEAD = """
Phi-4-multimodal's checkpoint on the Hub is for code of its own, by which only its language model is
read. Converted for transformers it is read whole but for its audio tower; what it learned about
images is in an adapter beside its weights, to be put on (`--adapter`) where there are images.
transformers has its vision tower attend to what comes before alone, in a batch in which nothing is
masked; geofast has it attend both ways always, as the checkpoint's own code does.

A family that is not here works too when its blocks can be found by structure; `geofast doctor
MODEL` says whether it is read rightly.

## Which row is mine?

| checkpoint | family |
|---|---|
"""
# Names of the Hub, of open_clip and of timm. By their config.json, WebSSL's checkpoints of MAE are
# ViTs, and those of DINO are DINOv2.
KNOWN = {
    "google/vit-base-patch16-224, google/vit-large-patch16-224": f.vit,
    "facebook/deit-base-distilled-patch16-224": f.deit,
    "facebook/dinov2-small, -base, -large": f.dinov2,
    "facebook/dinov2-giant, facebook/webssl-dino300m-full2b-224 and larger": f.webssl_dino,
    "facebook/dinov2-with-registers-base": f.dinov2_registers,
    "facebook/dinov3-vitb16-pretrain-lvd1689m, -vitl16-": f.dinov3_vit,
    "facebook/dinov3-convnext-tiny-pretrain-lvd1689m": f.dinov3_convnext,
    "facebook/vit-mae-base, -large": f.vit_mae,
    "facebook/webssl-mae300m-full2b-224, -mae1b-": f.webssl_mae,
    "facebook/sam-vit-base": f.sam,
    "microsoft/beit-base-patch16-224": f.beit,
    "microsoft/swin-tiny-patch4-window7-224": f.swin,
    "openai/clip-vit-base-patch32, openai/clip-vit-large-patch14": f.clip,
    "geolocal/StreetCLIP": f.clip,
    "facebook/metaclip-b16-400m, -b32-400m, -l14-fullcc2.5b": f.clip,
    "facebook/metaclip-2-worldwide-huge-quickgelu": f.metaclip2,
    "google/siglip-base-patch16-224, google/siglip-so400m-patch14-384": f.siglip,
    "google/siglip2-base-patch16-224": f.siglip,
    "google/siglip2-base-patch16-naflex": f.siglip2,
    "llava-hf/llava-1.5-7b-hf": f.llava,
    "llava-hf/llava-v1.6-mistral-7b-hf": f.llava_next,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": f.llava_onevision,
    "Qwen/Qwen2-VL-7B-Instruct": f.qwen2_vl,
    "Qwen/Qwen2.5-VL-3B-Instruct, -7B-": f.qwen2_5_vl,
    "Qwen/Qwen3-VL-4B-Instruct": f.qwen3_vl,
    "google/gemma-3-4b-it, google/gemma-3-12b-pt": f.gemma3,
    "google/paligemma-3b-pt-224": f.paligemma,
    "google/paligemma2-3b-pt-224": f.paligemma2,
    "OpenGVLab/InternVL3-2B-hf": f.internvl,
    "HuggingFaceM4/Idefics3-8B-Llama3": f.idefics3,
    "HuggingFaceTB/SmolVLM-Instruct": f.idefics3,
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": f.smolvlm,
    "mistral-community/pixtral-12b": f.pixtral,
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": f.mistral3,
    "microsoft/Phi-4-multimodal-instruct, converted for transformers": f.phi4_multimodal,
    "meta-llama/Llama-3.2-3B, HuggingFaceTB/SmolLM2-360M-Instruct": f.llama,
    "Qwen/Qwen3-4B": f.qwen3,
    "google/gemma-2-2b": f.gemma2,
    "mistralai/Mistral-7B-v0.3": f.mistral,
    "EleutherAI/pythia-1b": f.gpt_neox,
    "openai-community/gpt2": f.gpt2,
    "google-bert/bert-base-uncased": f.bert,
    "sentence-transformers/all-MiniLM-L6-v2": f.minilm,
    "FacebookAI/xlm-roberta-base": f.xlm_roberta,
    "open_clip:ViT-B-32/openai, open_clip:ViT-L-14/laion2b_s32b_b82k": f.open_clip_clip,
    "open_clip:ViT-H-14-worldwide/metaclip2_worldwide": f.open_clip_custom_text,
    "open_clip:ViT-B-16-SigLIP/webli": f.open_clip_siglip,
    "open_clip:xlm-roberta-base-ViT-B-32/laion5b_s13b_b90k": f.open_clip_roberta,
    "open_clip:RN50/openai": f.open_clip_resnet,
    "open_clip:coca_ViT-B-32/laion2b_s13b_b90k": f.open_clip_coca,
    "timm:vit_base_patch16_224.augreg2_in21k_ft_in1k": f.timm_vit,
    "timm:vit_base_patch14_reg4_dinov2.lvd142m": f.timm_vit_registers,
    "timm:deit_base_distilled_patch16_224.fb_in1k": f.timm_deit_distilled,
    "timm:eva02_base_patch14_448.mim_in22k_ft_in22k_in1k": f.timm_eva02,
    "timm:vit_base_patch16_siglip_224.webli": f.timm_vit_siglip,
    "timm:cait_s24_224.fb_dist_in1k": f.timm_cait,
    "timm:swin_base_patch4_window7_224.ms_in22k_ft_in1k": f.timm_swin,
    "timm:resnet50.a1_in1k": f.timm_resnet,
    "timm:convnext_base.fb_in22k_ft_in1k": f.timm_convnext,
}


def lacking():
    """Return the packages that some family needs and that are not here."""
    return sorted({package for package in f.NEEDS.values() if not find_spec(package)})


def page(rows):
    """Return the page with these rows of its table."""
    known = [f"| {names} | {title(family)} |" for names, family in KNOWN.items()]
    return HEAD + "\n".join(rows) + "\n" + KNOWN_HEAD + "\n".join(known) + "\n"


def rows_of(what, folder):
    """Return the rows of a family, or of one of `REAL`; it takes every package that it needs."""
    if what in f.REAL:
        return [row(what, gf.load(f.REAL[what]()), "real")]
    model = gf.load(f.save(what, folder))
    return [row(title(what), view, "random") for view in (model, model.other) if view]


def title(family):
    """Return what the page calls a family."""
    return family.__name__.replace("open_clip_", "open_clip: ").replace("timm_", "timm: ")


def row(name, view, weights):
    examples = WORDS if view.kind == "text" and weights == "random" else None
    checks = gf.doctor(view, examples, only=CHECKS).checks
    # A model for both kinds of input is examined with both.
    found = {c.name.removeprefix(f"{view.kind}: "): c.outcome for c in checks}
    words = ["-" if found[c] == "skip" else found[c] for c in CHECKS]
    kind, towers = type(view.module).__name__, ", ".join(t.name for t in view.towers)
    return f"| {name} | {kind} | {towers} | {view.kind} | {weights} | {' | '.join(words)} |"


if __name__ == "__main__":
    if absent := lacking():
        sys.exit(f"the page needs {', '.join(absent)}: install constraints-zoo.txt")
    rows = []
    for what in (*f.FAMILIES, *f.REAL):
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(what, Path(folder))
    (ROOT / "docs" / "families.md").write_text(page(rows))

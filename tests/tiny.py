"""Tiny random models of real architectures, from their configuration classes."""

import torch


def dinov2(layers=3, **changes):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    small = dict(hidden_size=32, num_attention_heads=2, image_size=28, patch_size=14)
    return Dinov2Model(Dinov2Config(**(small | {"num_hidden_layers": layers} | changes))).eval()


def vit():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    small = dict(hidden_size=32, num_attention_heads=2, image_size=32, patch_size=16)
    return ViTModel(ViTConfig(**small, num_hidden_layers=2, intermediate_size=64)).eval()


def clip_vision():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    small = dict(hidden_size=32, num_attention_heads=2, image_size=28, patch_size=14)
    return CLIPVisionModel(
        CLIPVisionConfig(**small, num_hidden_layers=2, intermediate_size=64)
    ).eval()


def llama(layers=3, width=32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=2 * width, vocab_size=100, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100)).eval()


def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    return BertModel(BertConfig(**small, vocab_size=100)).eval()


def tokenizer(side="right"):
    """A word tokenizer made here: the words w0 to w97, a padding token and an unknown one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(98)}
    plain = Tokenizer(WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", padding_side=side
    )


def bloom():
    """A causal model whose attention does not say that it is."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=100)).eval()


def clip():
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    small = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=64)
    config = CLIPConfig(
        text_config=small | {"vocab_size": 100},
        vision_config=small | {"image_size": 28, "patch_size": 14},
    )
    return CLIPModel(config).eval()


def sound():
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(0)
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    few = dict(conv_dim=(32, 32), conv_stride=(2, 2), conv_kernel=(2, 2))
    return Wav2Vec2Model(Wav2Vec2Config(**small, **few, num_feat_extract_layers=2))

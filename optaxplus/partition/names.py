r"""What the parameters of public code are called: regular expressions for their paths.

Paths are joined by "/". Names come from Flax linen and NNX, Haiku, Equinox, Gemma, T5X,
MaxText, big_vision, EasyDeL, Tunix and the Flax models of Hugging Face.
"""

__all__ = [
    "ATTENTION_IN",
    "ATTENTION_OUT",
    "BIAS",
    "CONVOLUTION",
    "EINSUM_GATES",
    "EINSUM_IN",
    "EINSUM_OUT",
    "ELEMENTWISE",
    "EMBEDDING",
    "EXPERT",
    "EXPERT_BIAS",
    "FUSED",
    "FUSED_THIRDS",
    "GATES",
    "HEAD",
    "HEAD_NORM",
    "KERNEL",
    "KEY",
    "LATENT",
    "LAYER_EMBEDDING",
    "LORA",
    "LORA_A",
    "LORA_B",
    "LORA_BASE",
    "NORM",
    "PATCHES",
    "QUERY",
    "ROUTER",
    "SCALE",
    "UNNAMED",
    "UNNAMED_ARRAY",
    "WEIGHT",
    "WEIGHT_OR_W",
]


def _ends(*names: str, suffix: str = "kernel|weights?|w") -> str:
    """Paths that end in one of `names`, or in an array in a module of that name."""
    return rf"(^|/)({'|'.join(names)})(/({suffix}))?$"


# Weights as libraries call them.
KERNEL = r"(^|/)(kernel|w)$"
WEIGHT = r"(^|/)weight$"
WEIGHT_OR_W = r"/(weight|w)$"

# Inputs and outputs of a model.
_HEAD_ANYWHERE = _ends(
    r"(?!(multi|attn|attention|per|single)_head)(\w+_)?head",
    r"unembed\w*",
    "embed_out",
    "readout",
    r"classifier(/out_proj)?",
    r"(\w+_)?logit(?!s?_(scale|bias))\w*",
    "decoder_pred",
    "predictions/decoder",
    "lm_head/decoder",
    "class_embed",
    "qa_outputs",
    "seq_relationship",
    "vocab_projector",
)
# What a whole model calls its output; inside a block it is a hidden matrix.
_HEAD_AT_THE_TOP = (
    r"^(params/)?(output|output_layer|output_projection|fc|fc_out|proj_out|score)"
    r"/(kernel|weight|w)$"
)
# The heads of an attention are none; value_head and the like are.
_OF_ATTENTION = r"^(?!.*att\w*/(\w+/)*([qkv]|query|key|value)_head)"
HEAD = rf"{_OF_ATTENTION}.*({_HEAD_ANYWHERE})|{_HEAD_AT_THE_TOP}"
LAYER_EMBEDDING = r"(^|/)per_layer\w*_embeddings?(/\w+)?$"
EMBEDDING = _ends(
    r"\w*embeddings?",
    r"\w*embeds?",
    r"(\w+_)?embed(ding)?_(tokens?|table)",
    r"(\w+_)?emb",
    r"pos\w*emb\w*",
    "wte",
    "wpe",
    r"pos(ition(s|al)?)?(_enc\w*)?",
    r"(pos\w*|token|\w*_bias)_table",
    "attention_biases",
    "scale_shift_table",
    r"(persistent_)?memory",
    r"\w+_tokens?",
    "cls",
    "probe",
    "codebooks?",
    "prototypes",
    "inducing_points",
    r"latents?(_array)?",
    r"(output_)?queries",
    "prompts?",
    "prefix",
    suffix="weight|w|table",
)
# The first convolution or dense layer of a vision model.
PATCHES = (
    r"(^|/)(embedding|patch_?embed\w*(/proj\w*)?|\w*_embedder/proj\w*|patchify)"
    r"/(kernel|w|weight)$"
)

# Vectors.
BIAS = r"(^|/)(\w+_)?(bias|b|beta|offset|shift)_?\d*$"
SCALE = r"(^|/)(\w+_)?(scale|gain|gamma)_?\d*$"
NORM = _ends(
    r"(?!\w*(proj|linear|dense))\w*norm\w*", r"ln(_?\d+|_\w+)?", suffix="weight|w"
)
# The norm of a query or key may have a scale for every head.
HEAD_NORM = r"(^|/)(q|k|query|key)_?(norm|ln)\w*(/\w+)?$"
# Numbers for every channel, of recurrences (Mamba, S4, S5, RWKV) and of policies.
ELEMENTWISE = (
    r"(^|/)(A|D|A_log|log_A(_real)?|(inv_)?A_(re|im|real|imag)|log_(dt|step)"
    r"|(\w+_)?log_?std|r_k|time_(mix\w*|decay|first|faaaa|maa_[a-z]))$"
)

# Attention: what the projections of query and key are called, and where they are.
QUERY = "query|q_proj|w?q"
KEY = "key|k_proj|w?k"
ATTENTION_IN = rf"(^|/)({QUERY}|{KEY}|value|v_proj|w?v)(/(kernel|w))?$"
ATTENTION_OUT = r"(^|/)(out|o_proj|out_proj|proj|w?o)(/(kernel|w))?$"
# Gemma's einsums, and the up-projections of latent attention (DeepSeek).
EINSUM_IN = r"(^|/)([qk]|kv|qkv)_einsum/w$"
EINSUM_OUT = r"(^|/)attn_vec_einsum/w$"
EINSUM_GATES = r"(^|/)gating_einsum(/w)?$"
LATENT = r"(^|/)w(q|kv)_b/kernel$"

# Several matrices in one array; the thirds are query | key | value side by side.
FUSED_THIRDS = _ends("c_attn", "qkv", "Wqkv", "to_qkv") + r"|(^|/)in_proj_weight$"
FUSED = f"{FUSED_THIRDS}|" + _ends(r"\w*(qkv|query_key_value)\w*")
GATES = r"(^|/)(dense_[ih]/kernel|weight_[ih]h|w_[ih])$"

CONVOLUTION = (
    r"(^|/)(?!Vmap|Scan)(\w*[Cc]onv(?!Local)|stem|downsample|shortcut|depthwise)\w*"
    r"/(kernel|w)$"
)

# Anything in a container of experts, and what experts are called in a block of them.
EXPERT = (
    r"^(?!.*(att|[Cc]onv|router)[^/]*/)(.*/)?("
    r"(\w+_)?experts?(_\w+)?(/\w+){0,2}|we_(gate|up|down)(_\w+)?"
    r"|((\w+_)?moe(_\w+)?|\w*Moe\w*|GptOssMlp)(_\d+)?/(\w+/)?(wi(_\d)?|wo|[wv]\d"
    r"|linear\w*|Dense_\d|(gate|up|down)(_proj)?|gate_up_proj|gating_einsum)"
    r"(/(kernel|w)|_bias)?)$"
)
EXPERT_BIAS = rf"^(?=.*({EXPERT})).*{BIAS}"
ROUTER = _ends(
    r"(\w*_)?router(_weights(/w)?|_logits|/proj|/gate|/dense)?",
    r"Router(_\d+)?(/\w+)?",
    r"\w*expert_gate",
    "sparse_feedforward_gate_dense",
)

# Factors of a low-rank update W + A·B.
LORA = (
    r"(^|/)(?P<stem>(\w*_)?lora(_kernel)?[_/])"
    r"(?P<factor>[abAB])(?P<rest>([./](kernel|weight|w))?)$"
)
LORA_A, LORA_B = (LORA.replace("[abAB]", letters) for letters in ("[aA]", "[bB]"))
# An array called LoRA, or one in a module called like a factor, that is none of those
# is for the reader to say. A module such as LoRADense_0 has a base as any other.
LORA_BASE = (
    rf"^(?!.*({LORA}))(?!(.*/)?[^/]*[lL]o[rR][aA][^/]*$)"
    r"(?!(.*/)?(\w*_)?lora(_kernel)?_[abAB](_\w+)?(/[^/]+){1,2}$)"
)

# What is left. A bias of several axes that nothing decided is no matrix.
UNNAMED = rf"^(?!.*{BIAS})"
UNNAMED_ARRAY = r"(^|/)(?!(kernel|weight|w)$)\w+$"

"""The four families, class by class: a forward from `modules.py` first, transformers' own class second."""

# mypy: disable-error-code="misc"
# (Both bases declare the weights, as Module and as Linear.)

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from .modules import MLP, Attention, CausalLM, Layer, Model, Norm, Rotary, adopt

# Llama


class LlamaRMSNorm(Norm, llama.LlamaRMSNorm):
    pass


class LlamaRotaryEmbedding(Rotary, llama.LlamaRotaryEmbedding):
    pass


class LlamaMLP(MLP, llama.LlamaMLP):
    pass


class LlamaAttention(Attention, llama.LlamaAttention):
    pass


class LlamaDecoderLayer(Layer, llama.LlamaDecoderLayer):
    pass


class LlamaModel(Model, llama.LlamaModel):
    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        adopt(self, LlamaRMSNorm, LlamaRotaryEmbedding, LlamaMLP, LlamaAttention, LlamaDecoderLayer)


class LlamaForCausalLM(CausalLM, llama.LlamaForCausalLM):
    base = LlamaModel


class LlamaForSequenceClassification(Model, llama.LlamaForSequenceClassification):
    pass


class LlamaForTokenClassification(Model, llama.LlamaForTokenClassification):
    pass


class LlamaForQuestionAnswering(Model, llama.LlamaForQuestionAnswering):
    pass


# Mistral


class MistralRMSNorm(Norm, mistral.MistralRMSNorm):
    pass


class MistralRotaryEmbedding(Rotary, mistral.MistralRotaryEmbedding):
    pass


class MistralMLP(MLP, mistral.MistralMLP):
    pass


class MistralAttention(Attention, mistral.MistralAttention):
    pass


class MistralDecoderLayer(Layer, mistral.MistralDecoderLayer):
    pass


class MistralModel(Model, mistral.MistralModel):
    def __init__(self, config: MistralConfig):
        super().__init__(config)
        adopt(self, MistralRMSNorm, MistralRotaryEmbedding, MistralMLP, MistralAttention, MistralDecoderLayer)


class MistralForCausalLM(CausalLM, mistral.MistralForCausalLM):
    base = MistralModel


class MistralForSequenceClassification(Model, mistral.MistralForSequenceClassification):
    pass


class MistralForTokenClassification(Model, mistral.MistralForTokenClassification):
    pass


class MistralForQuestionAnswering(Model, mistral.MistralForQuestionAnswering):
    pass


# Qwen2


class Qwen2RMSNorm(Norm, qwen2.Qwen2RMSNorm):
    pass


class Qwen2RotaryEmbedding(Rotary, qwen2.Qwen2RotaryEmbedding):
    pass


class Qwen2MLP(MLP, qwen2.Qwen2MLP):
    pass


class Qwen2Attention(Attention, qwen2.Qwen2Attention):
    pass


class Qwen2DecoderLayer(Layer, qwen2.Qwen2DecoderLayer):
    pass


class Qwen2Model(Model, qwen2.Qwen2Model):
    def __init__(self, config: Qwen2Config):
        super().__init__(config)
        adopt(self, Qwen2RMSNorm, Qwen2RotaryEmbedding, Qwen2MLP, Qwen2Attention, Qwen2DecoderLayer)


class Qwen2ForCausalLM(CausalLM, qwen2.Qwen2ForCausalLM):
    base = Qwen2Model


class Qwen2ForSequenceClassification(Model, qwen2.Qwen2ForSequenceClassification):
    pass


class Qwen2ForTokenClassification(Model, qwen2.Qwen2ForTokenClassification):
    pass


class Qwen2ForQuestionAnswering(Model, qwen2.Qwen2ForQuestionAnswering):
    pass


# Qwen3


class Qwen3RMSNorm(Norm, qwen3.Qwen3RMSNorm):
    pass


class Qwen3RotaryEmbedding(Rotary, qwen3.Qwen3RotaryEmbedding):
    pass


class Qwen3MLP(MLP, qwen3.Qwen3MLP):
    pass


class Qwen3Attention(Attention, qwen3.Qwen3Attention):
    pass


class Qwen3DecoderLayer(Layer, qwen3.Qwen3DecoderLayer):
    pass


class Qwen3Model(Model, qwen3.Qwen3Model):
    def __init__(self, config: Qwen3Config):
        super().__init__(config)
        adopt(self, Qwen3RMSNorm, Qwen3RotaryEmbedding, Qwen3MLP, Qwen3Attention, Qwen3DecoderLayer)


class Qwen3ForCausalLM(CausalLM, qwen3.Qwen3ForCausalLM):
    base = Qwen3Model


class Qwen3ForSequenceClassification(Model, qwen3.Qwen3ForSequenceClassification):
    pass


class Qwen3ForTokenClassification(Model, qwen3.Qwen3ForTokenClassification):
    pass


class Qwen3ForQuestionAnswering(Model, qwen3.Qwen3ForQuestionAnswering):
    pass

"""Every place where we patch vLLM, or set, call or read what nobody promised, and what we expect.

One row for each, under the module of ours that relies on it. serve/vllm_release.py holds the
installed source to them when a server starts, tests/test_vllm_releases.py that of every supported
release. Imports nothing.

A row is `Place("module:Class.name")` and what more must hold of it; see the fields of `Place`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# Held only where vLLM runs on a CPU: elsewhere nothing of these is imported.
ON_CPU: Final = (
    "serve.cpu_ops",
    "serve.forkserver",
    "serve.kernels",
    "serve.kernels_experts",
    "serve.lora_cpu",
)


@dataclass(frozen=True, slots=True)
class Place:
    """Something that a package declares; the other fields are what we rely on."""

    name: str  # module:attribute.attribute
    takes: str | None = None  # its parameters in order; `...` at the end: and whatever follows
    has: str = ""  # attributes of this class that we read or set
    uses: str = ""  # names its body must use: what we set there has to be read there
    body: str = ""  # the digest of its source where we stand in for the whole of it
    only: str = ""  # the one release that has it


_ENTRY = "vllm.entrypoints"
_LAYERS = "vllm.model_executor.layers"
_MOE = f"{_LAYERS}.fused_moe"
_QUANT = f"{_LAYERS}.quantization"
_LINEAR = "vllm.model_executor.kernels.linear"
_TOOLS = "vllm.tool_parsers.structural_tag_registry"
_INT8_MOE = (
    f"{_QUANT}.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_int8:"
    "CompressedTensorsW8A8Int8MoEMethod"
)

PLACES: Final[dict[str, tuple[Place, ...]]] = {
    "serve.vllm_compat": (
        # starting the app
        Place(f"{_ENTRY}.launchers.cli_args:make_arg_parser", takes="parser", only="0.32"),
        Place(f"{_ENTRY}.launchers.cli_args:validate_parsed_serve_args", takes="args", only="0.32"),
        Place(f"{_ENTRY}.serve.utils.api_utils:cli_env_setup", takes="", only="0.32"),
        Place(f"{_ENTRY}.common.cli_args:make_arg_parser", takes="parser", only="0.33"),
        Place(f"{_ENTRY}.common.cli_args:validate_parsed_serve_args", takes="args", only="0.33"),
        Place(f"{_ENTRY}.common.startup:cli_env_setup", takes="", only="0.33"),
        Place(
            f"{_ENTRY}.launchers.api_server.entry:run_server_worker",
            takes="listen_address sock args ...",
        ),
        # watch_requests
        Place(f"{_ENTRY}.serve.engine.serving:BaseServing._check_model", takes="self request"),
        Place(
            f"{_ENTRY}.pooling.base.serving:PoolingBaseServing._check_model", takes="self request"
        ),
        Place(
            f"{_ENTRY}.openai.chat_completion.serving:OpenAIServingChat.render_chat_request",
            uses="_check_model",
        ),
        Place(
            f"{_ENTRY}.openai.completion.serving:OpenAIServingCompletion.render_completion_request",
            uses="_check_model",
        ),
        Place(
            f"{_ENTRY}.openai.responses.serving:OpenAIServingResponses._create_responses",
            uses="_check_model",
        ),
        # render_with, keep_vocabulary, close_to_clients
        Place("vllm.renderers.hf:HfRenderer._apply_chat_template_async"),
        Place(
            "vllm.renderers.hf:HfRenderer.render_messages_async",
            uses="_apply_chat_template_async enable_prompt_embeds "
            "_ensure_prompt_embeds_placeholder_token",
        ),
        Place(
            "vllm.renderers.hf:safe_apply_chat_template",
            takes="model_config tokenizer conversation ...",
        ),
        Place("vllm.renderers.hf:_ensure_prompt_embeds_placeholder_token", takes="tokenizer"),
        Place("vllm.config.model:ModelConfig", has="enable_prompt_embeds"),
        # end_quietly
        Place("vllm.v1.engine.async_llm:AsyncLLM.shutdown", takes="self timeout"),
        Place("vllm.v1.engine.async_llm:AsyncLLM._run_output_handler", uses="logger exception"),
        # refuse_parts
        Place(
            "vllm.lora.model_manager:LoRAModelManager._create_merged_loras_inplace",
            takes="self lora_model",
        ),
        Place(
            "vllm.lora.model_manager:LoRAModelManager._get_lora_layer_weights",
            takes="self lora_model module_name",
        ),
        Place("vllm.lora.model_manager:LoRAModelManager", has="model modules"),
        Place("vllm.lora.model_manager:LoRAModelManager.add_adapter", uses="_add_adapter"),
        Place(
            "vllm.lora.model_manager:LoRAModelManager._add_adapter",
            uses="_create_merged_loras_inplace",
        ),
        Place("vllm.lora.lora_model:LoRAModel", has="loras"),
        # register, and where vLLM calls it and the other plugins
        Place("vllm.plugins:load_general_plugins", uses="load_plugins_by_group"),
        # layers_by_kernel
        Place("vllm.v1.engine.async_llm:AsyncLLM.collective_rpc", takes="self method timeout ..."),
    ),
    "serve.kernel_report": (
        Place("vllm.v1.worker.worker_base:WorkerBase.get_model", takes="self"),
        Place(
            "vllm.v1.worker.worker_base:WorkerWrapperBase.init_worker", uses="worker_extension_cls"
        ),
        Place(f"{_LAYERS}.linear:LinearBase", has="quant_method"),
        Place(f"{_LAYERS}.vocab_parallel_embedding:VocabParallelEmbedding", has="quant_method"),
        Place(f"{_LINEAR}:CPUWNA16LinearKernel.process_weights_after_loading", uses="use_w4a8"),
    ),
    "serve.isa": (
        Place(
            "vllm.platforms.cpu:CpuPlatform.import_kernels",
            uses="_is_avx512_supported _is_avx512_bf16_supported",
        ),
    ),
    "serve.forkserver": (
        Place("vllm.v1.engine.utils:CoreEngineProcManager.__init__", uses="get_mp_context"),
        Place("vllm.v1.executor.multiproc_executor:get_mp_context", takes=""),
    ),
    "serve.endpoints": (
        # Published and _publish: what is set must be what vLLM looks models up in
        Place(
            f"{_ENTRY}.openai.models.serving:OpenAIServingModels",
            has="lora_requests model_name is_base_model model_config",
        ),
        Place(
            f"{_ENTRY}.openai.models.serving:OpenAIServingModels.model_name",
            takes="self lora_request",
        ),
        Place(
            f"{_ENTRY}.openai.models.serving:OpenAIServingModels.is_base_model",
            takes="self model_name",
        ),
        Place(
            f"{_ENTRY}.serve.engine.serving:BaseServing._check_model",
            uses="_is_model_supported lora_requests",
        ),
        Place(
            f"{_ENTRY}.serve.engine.serving:BaseServing._is_model_supported", uses="is_base_model"
        ),
        Place(
            f"{_ENTRY}.serve.engine.serving:BaseServing._maybe_get_adapters", uses="lora_requests"
        ),
        Place(
            f"{_ENTRY}.pooling.base.serving:PoolingBaseServing._check_model", uses="lora_requests"
        ),
        Place(
            "vllm.v1.engine.async_llm:AsyncLLM",
            has="add_lora pin_lora remove_lora errored is_paused renderer model_config "
            "collective_rpc",
        ),
        Place("vllm.lora.request:LoRARequest", has="lora_name lora_int_id lora_path"),
        Place("starlette.datastructures:State", has="_state"),
        Place("starlette.routing:Router", has="lifespan_context"),
        Place(
            "vllm.plugins.endpoint_plugins.interface:EndpointPlugin",
            has="name required_tasks attach_router init_state",
        ),
        Place(
            "vllm.plugins.endpoint_plugins.interface:EndpointPlugin.init_state",
            takes="self engine_client state args",
        ),
    ),
    "serve.incoming": (
        # placing: vLLM's client is called by position
        Place(
            "vllm.v1.engine.async_llm:AsyncLLM.generate",
            takes="self prompt sampling_params request_id ...",
            uses="lora_request",
        ),
        Place(
            "vllm.v1.engine.async_llm:AsyncLLM.encode",
            takes="self prompt pooling_params request_id ...",
        ),
    ),
    "serve.vllm_tools": (
        # hold_arguments: what is set decides each tool's grammar
        Place(f"{_TOOLS}:_tool_is_strict", takes="tool"),
        Place(
            f"{_TOOLS}:resolve_tool_strictness",
            uses="_tool_is_strict",
        ),
        Place(f"{_TOOLS}:_dump_tool_for_xgrammar", takes="tool"),
        Place(
            f"{_TOOLS}:get_model_structural_tag",
            takes="model tools tool_choice reasoning ...",
            uses="resolve_tool_strictness _dump_tool_for_xgrammar",
        ),
        Place(
            "vllm.v1.structured_output.backend_xgrammar:validate_xgrammar_grammar",
            takes="sampling_params",
        ),
        # judge_requests, over watch_requests; reads_calls
        Place(f"{_ENTRY}.serve.engine.serving:BaseServing._check_model", takes="self request"),
        Place(
            f"{_ENTRY}.serve.engine.serving:BaseServing._is_model_supported",
            takes="self model_name",
        ),
        Place(
            f"{_ENTRY}.serve.engine.serving:BaseServing.create_error_response",
            takes="message err_type status_code param",
        ),
        Place(
            f"{_ENTRY}.pooling.base.serving:PoolingBaseServing._check_model", takes="self request"
        ),
        Place(
            "vllm.renderers.online_renderer:OnlineRenderer", has="parser use_harmony model_config"
        ),
        Place(
            "vllm.tool_parsers.abstract_tool_parser:ToolParser",
            has="supports_required_and_named structural_tag_model",
        ),
    ),
    "serve.voices": (
        Place(
            f"{_ENTRY}.openai.chat_completion.serving:OpenAIServingChat",
            has="default_sampling_params",
        ),
        Place(
            f"{_ENTRY}.openai.completion.serving:OpenAIServingCompletion",
            has="default_sampling_params",
        ),
        Place(
            f"{_ENTRY}.openai.responses.serving:OpenAIServingResponses",
            has="default_sampling_params",
        ),
        Place(
            f"{_ENTRY}.openai.chat_completion.protocol:ChatCompletionRequest.to_sampling_params",
            uses="default_sampling_params get",
        ),
        Place(
            "vllm.sampling_params:SamplingParams.update_from_generation_config",
            takes="self generation_config eos_token_id",
        ),
        Place(
            "vllm.sampling_params:SamplingParams",
            has="stop detokenize include_stop_str_in_output output_text_buffer_length",
        ),
    ),
    "serve.soft_prompts": (
        Place(
            "vllm.inputs.engine:EmbedsInput",
            has="type prompt_embeds prompt_token_ids is_token_ids prompt cache_salt",
        ),
        Place("vllm.v1.engine.input_processor:InputProcessor.process_inputs", uses="is_token_ids"),
        Place("vllm.renderers.base:BaseRenderer.validate_token_ids", takes="self token_ids ..."),
        Place("vllm.sampling_params:SamplingParams", has="max_tokens min_tokens prompt_logprobs"),
    ),
    "serve.stats": (
        Place(
            "vllm.v1.metrics.loggers:StatLoggerBase.__init__", takes="self vllm_config engine_index"
        ),
        Place(
            "vllm.v1.metrics.loggers:StatLoggerBase.record",
            takes="self scheduler_stats iteration_stats mm_cache_stats engine_idx",
        ),
        Place("vllm.v1.metrics.loggers:StatLoggerBase", has="log_engine_initialized"),
        Place("vllm.v1.metrics.stats:IterationStats", has="finished_requests"),
        Place(
            "vllm.v1.metrics.stats:FinishedRequestStats",
            has="request_id num_prompt_tokens num_generation_tokens",
        ),
    ),
    "serve.kernels": (
        Place(f"{_LINEAR}:_POSSIBLE_KERNELS"),
        Place(f"{_LINEAR}:_POSSIBLE_INT8_KERNELS"),
        Place(f"{_LINEAR}:choose_mp_linear_kernel", uses="_POSSIBLE_KERNELS can_implement"),
        Place(f"{_LINEAR}:init_int8_linear_kernel", uses="_POSSIBLE_INT8_KERNELS"),
        Place(f"{_LINEAR}:MPLinearKernel._get_weight_params", takes="self layer"),
        Place(f"{_LINEAR}:MPLinearKernel.can_implement", takes="cls c"),
        Place(f"{_LINEAR}:MPLinearKernel.process_weights_after_loading", takes="self layer"),
        Place(f"{_LINEAR}:MPLinearKernel.apply_weights", takes="self layer x bias"),
        Place(f"{_LINEAR}:MPLinearKernel", has="config w_q_name w_s_name w_zp_name"),
        Place(
            f"{_LINEAR}:MPLinearLayerConfig",
            has="partition_weight_shape weight_type act_type group_size zero_points",
        ),
        Place(f"{_LINEAR}:Int8ScaledMMLinearKernel.is_supported", takes="cls compute_capability"),
        Place(f"{_LINEAR}:Int8ScaledMMLinearKernel.apply_weights", takes="self layer x bias"),
        Place(f"{_LINEAR}:Int8ScaledMMLinearKernel", has="config layer_param_names"),
        Place(
            f"{_LINEAR}:Int8ScaledMMLinearLayerConfig",
            has="is_channelwise is_static_input_scheme input_symmetric",
        ),
        Place(f"{_LINEAR}:CPUWNA16LinearKernel.apply_weights", uses="cpu_gemm_wna16"),
        Place(f"{_LAYERS}.utils:dispatch_cpu_unquantized_gemm", takes="layer remove_weight"),
        Place(
            f"{_LAYERS}.vocab_parallel_embedding:"
            "UnquantizedEmbeddingMethod.process_weights_after_loading",
            uses="dispatch_cpu_unquantized_gemm",
        ),
        Place(
            f"{_LAYERS}.vocab_parallel_embedding:UnquantizedEmbeddingMethod.embedding",
            takes="self layer input_",
        ),
        Place(f"{_LAYERS}.vocab_parallel_embedding:VocabParallelEmbedding", has="params_dtype"),
        Place(f"{_QUANT}.auto_gptq:AutoGPTQLinearMethod.__init__", body="c09839307a23"),
        Place(
            f"{_QUANT}.auto_gptq:AutoGPTQLinearMethod.create_weights",
            uses="quant_config input_dtype quant_type kernel",
        ),
        Place(
            f"{_QUANT}.auto_gptq:AutoGPTQConfig.override_quantization_method",
            takes="cls hf_quant_cfg user_quant ...",
        ),
        Place(f"{_QUANT}.auto_gptq:AutoGPTQConfig.get_quant_method", takes="self layer prefix"),
        Place(
            f"{_QUANT}.auto_gptq:AutoGPTQConfig",
            has="quant_type modules_in_block_to_quantize packed_modules_mapping",
        ),
        Place(
            f"{_QUANT}.auto_gptq:get_moe_quant_method", takes="config layer prefix moe_method_cls"
        ),
        Place(
            f"{_QUANT}.utils.gptq_utils:get_linear_quant_method",
            takes="config layer prefix linear_method_cls",
        ),
    ),
    "serve.kernels_experts": (
        Place(_INT8_MOE),
        Place(f"{_INT8_MOE}.__init__", body="fb6b49d843cf"),
        Place(f"{_QUANT}.auto_gptq:AutoGPTQMoEMethod.__init__", body="e3f6f4cf4439"),
        Place(
            f"{_QUANT}.auto_gptq:AutoGPTQMoEMethod.apply",
            takes="self layer x topk_weights topk_ids ...",
        ),
        Place(
            f"{_INT8_MOE}.apply",
            takes="self layer x topk_weights topk_ids ...",
        ),
        Place(f"{_MOE}:FusedMoEMethodBase.__init__", takes="self moe"),
        Place(
            f"{_MOE}.unquantized_fused_moe_method:select_unquantized_moe_backend",
            takes="moe_config",
        ),
        Place(
            f"{_MOE}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod.__init__",
            uses="select_unquantized_moe_backend",
        ),
        Place(
            f"{_MOE}.config:FusedMoEConfig",
            has="is_lora_enabled activation has_bias ep_size tp_size",
        ),
    ),
    "serve.cpu_ops": (
        Place(f"{_LAYERS}.layernorm:RMSNorm.forward_native", takes="self x residual"),
        Place(
            f"{_LAYERS}.layernorm:RMSNorm",
            has="weight has_weight variance_size_override variance_epsilon forward_cpu",
        ),
        Place(
            "vllm.model_executor.custom_op:CustomOp.register_oot",
            takes="cls _decorated_op_cls name",
        ),
        Place("vllm.model_executor.custom_op:CustomOp.__new__", uses="op_registry_oot"),
        Place("vllm._custom_ops:rms_norm", takes="out input weight epsilon"),
        Place("vllm._custom_ops:fused_add_rms_norm", takes="input residual weight epsilon"),
        # rotate_parts
        Place(
            f"{_LAYERS}.rotary_embedding.base:RotaryEmbedding.forward_cpu",
            takes="self positions query key",
        ),
        # zero_new_blocks
        Place("vllm.v1.kv_cache_interface:KVCacheConfig", has="needs_kv_cache_zeroing"),
        Place(
            "vllm.v1.core.sched.scheduler:Scheduler._get_new_block_ids_to_zero",
            uses="needs_kv_cache_zeroing",
        ),
        Place(
            "vllm.v1.worker.cpu_model_runner:CPUModelRunner._zero_block_ids",
            takes="self block_ids",
        ),
    ),
    "serve.lora_cpu": (
        Place("vllm.platforms.cpu:CpuPlatform.get_punica_wrapper", takes="cls"),
        Place(
            "vllm.lora.punica_wrapper.punica_selector:get_punica_wrapper", uses="get_punica_wrapper"
        ),
        Place("vllm.lora.utils:_all_lora_classes"),
        Place(
            "vllm.lora.utils:from_layer",
            takes="layer max_loras lora_config packed_modules_list model_config",
            uses="_all_lora_classes",
        ),
        Place("vllm.lora.layers.base_linear:_get_lora_device", takes="base_layer"),
        Place("vllm.lora.layers.fused_moe:_get_lora_device", takes="base_layer"),
        Place(
            "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.update_metadata",
            takes="self mapping lora_index_to_id max_loras vocab_size kwargs",
        ),
        Place(
            "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU._apply_shrink",
            takes="self y x w_t_all scale",
        ),
        Place(
            "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU._apply_expand",
            takes="self y x w_t_all y_offset y_slice_size add_inputs",
        ),
        Place(
            "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_embedding",
            takes="self y x lora_b_stacked add_inputs kwargs",
        ),
        Place(
            "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_logits",
            takes="self y x lora_a_stacked lora_b_stacked scale buffer kwargs",
        ),
        Place(
            "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU",
            has="token_lora_indices sampler_indices",
        ),
        Place(
            "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.__init__",
            takes="self base_layer",
        ),
        Place(
            "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.reset_lora", takes="self index"
        ),
        Place(
            "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.set_lora",
            takes="self index lora_a lora_b",
        ),
        Place(
            "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_lora_to_output",
            takes="self x output",
        ),
        Place(
            "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA",
            has="lora_a_stacked lora_b_stacked tp_size punica_wrapper",
        ),
        Place("vllm.lora.layers:ColumnParallelLinearWithLoRA.forward", takes="self input_"),
        Place("vllm.lora.layers:RowParallelLinearWithLoRA.forward", takes="self input_"),
        Place("vllm.lora.layers:ReplicatedLinearWithLoRA.forward", takes="self input_"),
        Place("vllm.lora.layers:VocabParallelEmbeddingWithLoRA.forward", takes="self x"),
    ),
}

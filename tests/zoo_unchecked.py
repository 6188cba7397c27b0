"""Types of transformers of which no model is checked, and what is expected where one is."""

_UNCHECKED = {
    "no cut of its config gives a model of few weights": """
    align bark blip_2_qformer blt clap cvt dac dbrx decision_transformer deepseek_ocr2 deimv2 dinov3_convnext
    donut-swin dots1 dots3_note edgetam edgetam_video edgetam_vision_model efficientloftr efficientnet emu3 esm esmc
    fast_vlm fastspeech2_conformer_with_hifigan florence2 focalnet fun_asr_nano funnel gemma3n gemma3n_text
    gemma3n_vision gemma4 gemma4_text glm46v glm4v glm4v_moe glm4v_moe_vision glm4v_vision glm5_next glm5_next_text
    glm5_next_vision glm_image glm_image_vqmodel glm_moe_dsa glm_ocr glm_ocr_vision glmga gpt_neo granite4_vision
    granite_docling granite_docling_vision granite_speech5_ctc granite_speech5_encoder grounding-dino hgnet_v2 hiera
    higgs_audio_v2_tokenizer hunyuan_v1_dense hunyuan_v1_moe hunyuan_vl hunyuan_vl_text hy_v4_vl hy_v4_vl_text
    informer inkling2 inkling2_loop inkling2_vision janus kyutai_speech_to_text layoutlmv2 lfm2_moe llama4 luke
    mamba2 mask2former maskformer maskformer-swin mimi mimi_decoder ministral mm-grounding-dino molmo2
    moonshine_streaming muse_glimmer muse_spark muse_spark_audio musicgen musicgen_melody nemo_speechlm nemotron
    nemotron3_5_transcribe_audio nemotron3_5_transcribe_word_timestamp neucodec omdet-turbo oneformer
    pe_audio_encoder pe_audio_video pe_audio_video_encoder pe_video pe_video_encoder perceiver
    pocket_tts_audio_tokenizer pp_doclayout_v3 pp_doclayout_v4 prophetnet qwen2_vl regnet roc_bert rt_detr
    rt_detr_v2 sam2 sam2_hiera_det_model sam2_video sam2_vision_model sam3_tracker_video sam3_video seamless_m4t
    swin swinv2 t5gemma2_encoder timm_wrapper tvp vibevoice vibevoice_acoustic_tokenizer
    vibevoice_acoustic_tokenizer_decoder vibevoice_acoustic_tokenizer_encoder vjepa2
    """,
    "its forward wants inputs that are not known here": """
    apertus1p5 audio-spectrogram-transformer audioflamingo3_encoder autoformer blip-2 bridgetower chameleon clvp
    convnextv2
    cohere_compass cohere_compass_text cohere_compass_vision conditional_detr convnext cosmos3_edge_vision csm
    d_fine dab-detr deepseek_v2 deformable_detr depth_pro detr dia diffusion_gemma dinat dots3_note_text
    ernie4_5_vl_moe exaone4_5_vision fun_asr_nano_encoder gemma3n_audio gemma4_audio gemma4_vision glm4_moe_lite
    glm4v_moe_text glm4v_text glm_image_text glm_image_vision glm_ocr_text gptj granitemoehybrid hunyuan_vl_vision
    hy_v4_vl_vision idefics instructblip instructblipvideo jamba kimi_k25 kimi_k25_vision kimi_linear kosmos-2 lfm3
    lfm3_vl lfm3_vl_vision lilt longcat_flash lw_detr lxmert minicpm3 minicpm_ocr minicpm_ocr_vision minicpmv4_6
    minicpmv4_7 minicpmv4_7_vision mistral4 mistral_large4 mistral_large4_text muse_glimmer_assistant
    muse_glimmer_vision muse_spark_vision owlv2 owlvit paddleocr_vl pe_audio perception_lm pi0
    pocket_tts_audio_tokenizer_decoder pp_ocrv6_medium_det pp_ocrv6_small_det qwen2_5_omni_thinker qwen2_5_vl
    qwen2_5_vl_text qwen2_5_vl_vision qwen2_vl_text qwen3_5_moe_text qwen3_5_moe_vision qwen3_5_vision
    qwen3_asr_encoder qwen3_vl_moe_vision qwen3_vl_vision qwen4_exp qwen4_exp_vision rf_detr sam sam3 sam3_lite_text
    sam3_tracker sam_hq sam_hq_vision_model sam_vision_model seggpt siglip2 siglip2_vision_model step3p7
    table-transformer time_series_transformer timesformer timm_backbone udop video_llama_3_vision videoprism
    voxtral_realtime
    """,
    "not tried yet": """
    uvdoc vibevoice_asr video_llava videomae videoprism_vision_model vision-text-dual-encoder visual_bert vit_mae
    vits vivit voxtral voxtral_realtime_encoder voxtral_realtime_text wav2vec2-bert wav2vec2-conformer wavlm
    wavtokenizer wavtokenizer_encoder whisper xclip xcodec xcodec2 xglm xlm xlm-roberta xlm-roberta-xl xlnet xlstm
    xmod yolos yoso youtu zamba zamba2 zaya colmodernvbert colpali colqwen2 gemma4_assistant
    gemma4_unified_assistant trocr pp_lcnet shieldgemma2 tipsv2_dpt upernet eomt eomt_dinov3 videomt nemotron_h_omni
    pix2struct pp_chart2table pp_formulanet vision-encoder-decoder qwen2_5_omni qwen3_omni_moe pp_doclayout_v2
    pp_ocrv5_mobile_det pp_ocrv5_server_det chmv2 depth_anything prompt_depth_anything zoedepth slanet slanext
    encoder-decoder pop2piano speech-encoder-decoder lw_detr_vit pp_lcnet_v3 pp_lcnet_v4 rf_detr_dinov2
    rt_detr_resnet uvdoc_backbone vitpose_backbone superpoint superglue jev vitmatte vitpose
    """,
}

UNCHECKED = {model_type: reason for reason, types in _UNCHECKED.items() for model_type in types.split()}
"""Why a model of a type may not be built or run. Those that can be are checked nevertheless."""

MOST = 390
"""How many types may be unchecked: fewer as sizes and inputs are added, and never more."""

_INDEXER = r"\.indexer\."
_CHOOSES = "it chooses tokens, and is trained by a loss that the model does not compute"
EXPECTED = {
    **dict.fromkeys(("minimax_m3_vl", "qwen4_exp"), (_INDEXER, _CHOOSES)),
    "deepseek_v4": (r"\.(indexer|compressor)\.", f"{_CHOOSES}; the inputs are too short for it to compress any"),
    **dict.fromkeys(
        ("fastspeech2_conformer", "fastspeech2_conformer_with_hifigan", "vits"),
        ("duration_predictor", "without labels its output is rounded to integers"),
    ),
    **dict.fromkeys(
        ("encoder-decoder", "vision-encoder-decoder"), (r"encoder\.pooler", "the decoder reads the states before it")
    ),
    "flava": ("text_to_mm_projection", "its output is used with images and text together"),
    **dict.fromkeys(("levit", "superglue"), ("(?!)", "cut down, it has no effects above rounding")),
    "lightglue": (
        r"keypoint_detector|matchability|token_confidence",
        "no gradient reaches the detector of the points, and the others decide which points are left out",
    ),
    "lilt": (r"encoder\.layer\.1\..*layout", "the layout after the last layer is not part of the output"),
    "pe_audio_encoder": (r"embedder\.(dac_encoder|bottleneck)", "it encodes the audio under no_grad"),
    "uvdoc_backbone": ("bridge", "of its feature maps it returns those that its config asks for"),
    "pocket_tts": ("audio_latent_proj", "the inputs tried here have no audio for it to embed"),
    "mra": ("attention", "without its kernels for a GPU the attention returns zeros"),
}
"""By type the weights, as a regex, in which something is found, and why that is no mistake of the library."""

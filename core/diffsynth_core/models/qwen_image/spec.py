"""Declaration of Qwen-Image. No torch."""

from diffsynth_core.models.control import CONTROL_IMAGE, CONTROLNET, CONTROLNET_IMAGE, FILE_PATTERNS
from diffsynth_core.models.qwen_image.keys import (
    DIT_BLOCKS,
    DIT_MODULES,
    DIT_SIDES,
    LORA_TARGETS,
    TEXT_ENCODER_FILES,
    TEXT_ENCODER_PUBLISHED,
    dead_modules,
    unused_in_text_encoder,
    unused_in_vae,
)
from diffsynth_core.models.qwen_image.sizes import PUBLISHED
from diffsynth_core.models.qwen_image.variants import EDIT, EDIT_IMAGE, EDIT_SMALL, variant
from diffsynth_core.models.qwen_image.work import WORK
from diffsynth_core.models.spec import (
    ComponentFacts,
    FamilyFacts,
    Layout,
    ShapeConstraint,
    TokenizerFacts,
    UnsupportedCheckpoint,
)
from diffsynth_core.models.wan.keys import VAE_2_1, VAE_2_1_ORIGINAL_SIGNATURE

QWEN_IMAGE = FamilyFacts(
    name="qwen-image",
    implementation="diffsynth_core.models.qwen_image.family:QwenImage",
    title="Qwen-Image",
    model_ids=("diffsynth/shapes", "Qwen/Qwen-Image*", "DiffSynth-Studio/Qwen-Image*", "FireRedTeam/FireRed-Image*"),
    components=(
        ComponentFacts(
            name="dit",
            title="diffusion transformer",
            work=WORK,
            layouts=(
                Layout(
                    frozenset(
                        {"transformer_blocks.0.img_mod.1.weight", "txt_norm.weight", "img_in.weight", "proj_out.weight"}
                    )
                ),
            ),
            file_patterns=("transformer/*", "diffusion_pytorch_model*"),
            config_classes=("QwenImageTransformer2DModel",),
            lora_targets=LORA_TARGETS,
            modules=DIT_MODULES,
            sides=DIT_SIDES,
            blocks={"transformer_blocks": "num_layers"},
            max_blocks=DIT_BLOCKS,
            unused_params=dead_modules,
            settings={"zero_cond_t": (EDIT_IMAGE,)},
            comfyui="original",
            folder="transformer",
        ),
        ComponentFacts(
            name="text_encoder",
            title="Qwen2.5-VL text encoder",
            layouts=(
                Layout(frozenset({"model.embed_tokens.weight", "visual.patch_embed.proj.weight"}), TEXT_ENCODER_FILES),
                Layout(
                    frozenset({"model.language_model.embed_tokens.weight", "model.visual.patch_embed.proj.weight"}),
                    TEXT_ENCODER_FILES,
                ),
            ),
            file_patterns=("text_encoder/*",),
            published={"original": TEXT_ENCODER_PUBLISHED},
            unused_params=unused_in_text_encoder,
            comfyui="original",
        ),
        ComponentFacts(
            name="vae",
            title="VAE",
            layouts=(
                Layout(frozenset({"encoder.conv_in.weight", "encoder.norm_out.gamma", "post_quant_conv.weight"})),
                Layout(VAE_2_1_ORIGINAL_SIGNATURE, VAE_2_1, borrowed=True),  # ComfyUI's file: it is a VAE of Wan 2.1
            ),
            file_patterns=("vae/*",),
            unused_params=unused_in_vae,
            comfyui=VAE_2_1,
        ),
        ComponentFacts(
            name=CONTROLNET,
            title="ControlNet",
            work=WORK,
            layouts=(
                Layout(
                    frozenset(
                        {
                            "transformer_blocks.0.img_mod.1.weight",
                            "controlnet_x_embedder.weight",
                            "controlnet_blocks.0.weight",
                        }
                    )
                ),
            ),
            file_patterns=FILE_PATTERNS,
            config_classes=("QwenImageControlNetModel",),
            blocks={"transformer_blocks": "num_layers", "controlnet_blocks": "num_layers"},
            inputs=(CONTROLNET_IMAGE,),
        ),
    ),
    architectures={
        "*Qwen-Image-Edit-2509": "Qwen-Image-Edit-Plus",
        "*Qwen-Image-Edit-2511": "Qwen-Image-Edit-2511",
        "*Qwen-Image-Edit": "Qwen-Image-Edit",
        "FireRedTeam/*": "Qwen-Image-Edit-Plus",
        "Qwen/Qwen-Image": "Qwen-Image",
    },
    repository="https://github.com/QwenLM/Qwen-Image",
    denoiser="dit",
    variant=variant,
    text_column="prompt",
    masks_captions=True,
    conditions=(EDIT, EDIT_SMALL, CONTROL_IMAGE),
    later_inputs=(
        *("blockwise_controlnet_image", "blockwise_controlnet_inpaint_mask", "context_image", "layer_input_image"),
        *("layer_num", "eligen_entity_prompts", "eligen_entity_masks"),
    ),
    published=PUBLISHED,
    tokenizers={
        "tokenizer_path": TokenizerFacts(
            "text_encoder",
            ("../tokenizer",),
            "Qwen/Qwen-Image:tokenizer",
            model="BPE",
            embedding="model.language_model.embed_tokens.weight",
        ),
        "processor_path": TokenizerFacts(
            "text_encoder",
            ("../processor",),
            "Qwen/Qwen-Image-Edit:processor",
            layouts=(("preprocessor_config.json",),),
            files=("preprocessor_config.json",),
            what="processor",
            inputs=(EDIT_IMAGE,),
        ),
    },
    not_trained={
        "*Qwen-Image-Layered*:transformer*": "Qwen-Image-Layered",
        "DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-*:*": "the Qwen-Image blockwise ControlNet",
    },
    shape_constraints=(
        ShapeConstraint(
            "text_encoder", ("model.language_model.embed_tokens.weight", 1), ("txt_in.weight", 1), "text states"
        ),
        ShapeConstraint("vae", ("post_quant_conv.weight", 0), ("proj_out.weight", 0), "latents", parts=4),
        ShapeConstraint(CONTROLNET, ("controlnet_blocks.0.weight", 0), ("img_in.weight", 0), "states"),
        ShapeConstraint(CONTROLNET, ("txt_in.weight", 1), ("txt_in.weight", 1), "text states", verb="takes"),
        ShapeConstraint(
            CONTROLNET,
            ("controlnet_x_embedder.weight", 1),
            ("img_in.weight", 1),
            "patches",
            verb="takes",
            way_out="use a ControlNet with only a control image, not one for inpainting",
        ),
    ),
    lookalikes=(
        UnsupportedCheckpoint(
            "a blockwise ControlNet, which is not supported yet",
            CONTROLNET,
            frozenset({"controlnet_blocks.0.x_rms.weight", "controlnet_blocks.0.y_rms.weight"}),
        ),
        UnsupportedCheckpoint(
            "a FLUX.1 ControlNet",
            CONTROLNET,
            frozenset({"controlnet_x_embedder.weight", "transformer_blocks.0.norm1_context.linear.weight"}),
        ),
    ),
)

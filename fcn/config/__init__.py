"""Config: every key, read strictly from YAML and the command line.

It knows what a key accepts and must never know what is done with it, nor import PyTorch.
"""

from fcn.lazy import door

__getattr__, __all__ = door(
    __name__,
    keys="IMAGENET_MEAN IMAGENET_STD PRETRAINED Config Data Eval Loss Optim Train protocol total_steps",
    import_path="TRUST_OPTION call_by_path refuse_foreign_code",
    load="config_changes config_from_dict flatten load_config read_saved_config save_config to_dict",
    mask_values="pixel_classes",
)

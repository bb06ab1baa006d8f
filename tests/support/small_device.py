"""Models on a device with too little memory for some of their passes."""

import torch


def limit_memory(monkeypatch, module, is_too_much):
    """Let models that `module` loads run out of memory in a pass where `is_too_much(model, ids_BT)`."""
    load_model = module.load_model

    def load(*arguments, **options):
        model, tokenizer = load_model(*arguments, **options)

        def refuse(model, positional, named):
            if is_too_much(model, positional[0] if positional else named["input_ids"]):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has no more")

        model.register_forward_pre_hook(refuse, with_kwargs=True)
        return model, tokenizer

    monkeypatch.setattr(module, "load_model", load)

from stored_models import put_data, put_model, root, store, tokenizer

__all__ = ["put_data", "put_model", "root", "store", "tokenizer"]

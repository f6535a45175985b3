"""The contract with SGLang: everything of it that this package touches, as rows, and their check.

SGLang's sources are read with :mod:`ast` and never imported, so every release can be checked in any
environment, and the installed one before anything heavy is loaded.

* :mod:`~sglang_musa_ext.upstream.releases`: the releases that are supported.
* :mod:`~sglang_musa_ext.upstream.rows`: the rows, by theme.
* :mod:`~sglang_musa_ext.upstream.check`: comparing them with sources.
* :mod:`~sglang_musa_ext.upstream.names`: names that modules of this package share with the rows.
"""

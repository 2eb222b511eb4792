"""Serving: a trained model as a program and its weights, without the code and configuration that made it.

:mod:`torchrec_sid.serving.exporter` writes such a folder; :mod:`torchrec_sid.serving.served_model` runs it
and needs torch and fbgemm_gpu alone. Nothing is imported here, so that a server does not import TorchRec.
"""

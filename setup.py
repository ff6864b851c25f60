from setuptools import setup

setup(cffi_modules=["cffi_build.py:STABLE", "cffi_build.py:XENCTRL", "cffi_build.py:EVTCHN"])

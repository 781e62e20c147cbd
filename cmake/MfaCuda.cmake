# MfaCuda.cmake: libmfa_cuda.so, the attention kernels for NVIDIA GPUs and their launches from MLX's CUDA build.
#
# Needs nvcc and the files of the wheel mlx-cuda-13 (its headers and libmlx.so), but no GPU. The library lies beside
# libmfa.so, which loads it when the running MLX is the CUDA build: see src/mlx/gpu.cpp.

set(MFA_MLX_CUDA_ROOT "" CACHE PATH "The folder `mlx` of MLX's CUDA wheel; empty = that of the Python environment")
set(MFA_CUDA_ARCHS "90" CACHE STRING "Compute capabilities with machine code; other cards get it from the PTX of 8.0")

find_program(MFA_NVCC nvcc HINTS /usr/local/cuda/bin ENV CUDA_HOME PATH_SUFFIXES bin)
if(NOT MFA_NVCC)
  message(STATUS "CUDA part: left out, nvcc is not installed")
  return()
endif()
if(MFA_MLX_CUDA_ROOT)
  set(mlx_cuda "${MFA_MLX_CUDA_ROOT}")
else()
  cmake_path(GET MLX_INCLUDE_DIRS PARENT_PATH mlx_cuda)
endif()
if(NOT EXISTS "${mlx_cuda}/include/mlx/backend/cuda/device.h")
  message(STATUS "CUDA part: left out, ${mlx_cuda} has no headers of MLX's CUDA build")
  return()
endif()
cmake_path(GET MFA_NVCC PARENT_PATH cuda_root)
cmake_path(GET cuda_root PARENT_PATH cuda_root)

# ---- kernels: one fat binary for each source ------------------------------------------------------------------------
set(kernel_folder "${PROJECT_BINARY_DIR}/cuda")
file(MAKE_DIRECTORY "${kernel_folder}")
file(GLOB kernel_sources CONFIGURE_DEPENDS src/backend/cuda/device/*.cu)
set(generate -gencode=arch=compute_80,code=compute_80)
foreach(arch ${MFA_CUDA_ARCHS})
  list(APPEND generate -gencode=arch=compute_80,code=sm_${arch})
endforeach()
set(fatbins "")
foreach(source ${kernel_sources})
  cmake_path(GET source STEM name)
  set(fatbin "${kernel_folder}/${name}.fatbin")
  set(flags ${generate})
  if(name MATCHES "^hopper_")  # wgmma and TMA exist on sm_90a alone
    set(flags -gencode=arch=compute_90a,code=sm_90a)
  endif()
  add_custom_command(
    OUTPUT "${fatbin}"
    COMMAND "${MFA_NVCC}" -std=c++20 -O3 --fatbin ${flags} -lineinfo --expt-relaxed-constexpr 
            -Xptxas -warn-spills -I "${PROJECT_SOURCE_DIR}/src" -MD -MF "${fatbin}.d" -o "${fatbin}" "${source}"
    DEPENDS "${source}" DEPFILE "${fatbin}.d" VERBATIM COMMENT "Compiling CUDA kernels ${name}")
  list(APPEND fatbins "${fatbin}")
endforeach()

# ---- libmfa_cuda.so -------------------------------------------------------------------------------------------------
add_library(mfa_cuda SHARED src/backend/cuda/attention.cpp src/backend/cuda/module.cpp)
mfa_compile_options(mfa_cuda)
target_compile_definitions(mfa_cuda PRIVATE MFA_MLX_VERSION="${MFA_MLX_VERSION}")
set_source_files_properties(src/backend/cuda/module.cpp PROPERTIES
                            OBJECT_DEPENDS "${fatbins}" COMPILE_DEFINITIONS "MFA_CUDA_KERNELS=\"${kernel_folder}\"")
target_include_directories(mfa_cuda PRIVATE include src)
target_include_directories(mfa_cuda SYSTEM PRIVATE src/backend/cuda/mlx_shim "${mlx_cuda}/include" "${cuda_root}/include")
target_link_libraries(mfa_cuda PRIVATE mfa_core "${mlx_cuda}/lib/libmlx.so" "${cuda_root}/lib64/stubs/libcuda.so")
# What MLX's library needs in turn (cuDNN, cuBLAS) is not installed where this is only built.
target_link_options(mfa_cuda PRIVATE -Wl,-z,defs -Wl,--allow-shlib-undefined)
set_target_properties(mfa_cuda PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON
                                          SKIP_BUILD_RPATH ON INSTALL_RPATH "$ORIGIN/../../mlx/lib")
install(TARGETS mfa_cuda LIBRARY DESTINATION lib COMPONENT library)

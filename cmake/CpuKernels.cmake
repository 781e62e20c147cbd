# CpuKernels.cmake: one object library for each instruction set, src/backend/cpu/{kernels,matmul,layers}_<isa>.cc, with
# its own flags.
#
# The units use Highway's headers only: static targets, chosen by the compiler flags, so nothing of Highway is linked.
# Highway takes a target only if every feature it expects is enabled; AES, PCLMUL, BMI and F16C are listed for that.

set(MFA_CPU_ISAS "" CACHE STRING "Instruction sets to build (avx2;avx512;avx512_bf16;neon); empty = all of the processor")

find_path(MFA_HIGHWAY_INCLUDE_DIR hwy/highway.h)
if(NOT MFA_HIGHWAY_INCLUDE_DIR)
  include(FetchContent)
  FetchContent_Declare(
    highway
    URL https://github.com/google/highway/archive/refs/tags/1.2.0.tar.gz
    URL_HASH SHA256=7e0be78b8318e8bdbf6fa545d2ecb4c90f947df03f7aadc42c1967f019e63343
    DOWNLOAD_EXTRACT_TIMESTAMP ON
    SOURCE_SUBDIR headers-only)  # a folder that does not exist: its own build is not added
  FetchContent_MakeAvailable(highway)
  set(MFA_HIGHWAY_INCLUDE_DIR "${highway_SOURCE_DIR}")
endif()

include(CheckCXXCompilerFlag)

# Adds {kernels,matmul,layers}_<isa>.cc to `target` if the first exists and the compiler knows its flags, and defines MFA_HAVE_<ISA>.
function(mfa_add_cpu_kernels target isa)
  set(source "${PROJECT_SOURCE_DIR}/src/backend/cpu/kernels_${isa}.cc")
  string(TOUPPER "${isa}" ISA)
  if(NOT EXISTS "${source}" OR (MFA_CPU_ISAS AND NOT isa IN_LIST MFA_CPU_ISAS))
    return()
  endif()
  if(ARGN)
    string(REPLACE ";" " " flags "${ARGN}")
    check_cxx_compiler_flag("${flags}" MFA_COMPILES_${ISA})
    if(NOT MFA_COMPILES_${ISA})
      message(STATUS "CPU kernels ${isa}: left out, the compiler does not accept ${flags}")
      return()
    endif()
  endif()
  set(unit mfa_kernels_${isa})
  add_library(${unit} OBJECT "${source}" "${PROJECT_SOURCE_DIR}/src/backend/cpu/matmul_${isa}.cc"
                             "${PROJECT_SOURCE_DIR}/src/backend/cpu/layers_${isa}.cc")
  mfa_compile_options(${unit})
  target_include_directories(${unit} PRIVATE "${PROJECT_SOURCE_DIR}/src")
  target_include_directories(${unit} SYSTEM PRIVATE "${MFA_HIGHWAY_INCLUDE_DIR}")
  target_compile_options(${unit} PRIVATE ${ARGN})
  if(NOT MFA_SANITIZE)  # instrumented kernels take minutes to optimise; they keep the build type's level
    target_compile_options(${unit} PRIVATE -O3)
  elseif(MFA_SANITIZE MATCHES "address")  # thousands of inlined vectors: watching their scopes doubles the time
    target_compile_options(${unit} PRIVATE -fno-sanitize-address-use-after-scope)
  endif()
  # Highway's debug assertions call into its library, which is not linked.
  target_compile_definitions(${unit} PRIVATE HWY_IS_DEBUG_BUILD=0 MFA_HAVE_${ISA}=1)
  set_target_properties(${unit} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden
                                           VISIBILITY_INLINES_HIDDEN ON)
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${unit}>)
  target_compile_definitions(${target} PUBLIC MFA_HAVE_${ISA}=1)
endfunction()

# Adds every instruction set of the processor that is built for.
function(mfa_add_all_cpu_kernels target)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    set(avx2 -mavx2 -mfma -mbmi -mbmi2 -mf16c -maes -mpclmul)
    set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -mprefer-vector-width=512)
    mfa_add_cpu_kernels(${target} avx2 ${avx2})
    mfa_add_cpu_kernels(${target} avx512 ${avx512})
    mfa_add_cpu_kernels(${target} avx512_bf16 ${avx512} -mavx512bf16 -mavx512vnni)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
    mfa_add_cpu_kernels(${target} neon -march=armv8-a+crypto)
  endif()
endfunction()

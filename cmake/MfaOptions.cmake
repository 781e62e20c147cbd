# MfaOptions.cmake: compile options that every target of this project shares.

option(MFA_WERROR "Treat compiler warnings as errors" ON)
set(MFA_SANITIZE "" CACHE STRING "Sanitizers for every target of this project: \"address,undefined\", \"thread\" or empty")

# Applies the project's warnings, floating-point rules and sanitizers to `target`.
# No contraction: a product and a sum round twice in host code, so that results do not depend on the compiler. Kernels
# ask for fused multiply-adds by name.
function(mfa_compile_options target)
  target_compile_features(${target} PRIVATE cxx_std_20)
  target_compile_options(${target} PRIVATE -Wall -Wextra -ffp-contract=off)
  if(MFA_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
  if(MFA_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=${MFA_SANITIZE} -fno-sanitize-recover=all
                                             -fno-omit-frame-pointer)
    target_link_options(${target} PRIVATE -fsanitize=${MFA_SANITIZE})
  endif()
endfunction()

# Compiles the headers named after `target` once for its units, which spend half of their time on them; with REUSE_FROM
# and a target of the same options, those of that. Not behind a compiler launcher: ccache cannot keep such units.
function(mfa_precompile target)
  if(NOT CMAKE_CXX_COMPILER_LAUNCHER)
    if(ARGV1 STREQUAL "REUSE_FROM")
      target_precompile_headers(${target} ${ARGN})
    else()
      target_precompile_headers(${target} PRIVATE ${ARGN})
    endif()
  endif()
endfunction()

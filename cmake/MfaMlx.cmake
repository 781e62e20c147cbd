# MfaMlx.cmake: the shared library `mfa` for MLX, its CMake package, and the Python module `_ext`.
#
# Installed tree, the same in a wheel (below mlx_mfa/) and in a prefix:
#   _ext.abi3.so, _ext.pyi      component python
#   _build_info.py              component python
#   lib/libmfa.so               component library
#   include/mfa/*.h             component library
#   share/cmake/mfa/*.cmake     component library

find_package(Python 3.10 COMPONENTS Interpreter Development.Module REQUIRED)

# MLX and nanobind come from the Python environment unless the caller names them.
if(NOT MLX_ROOT)
  execute_process(COMMAND "${Python_EXECUTABLE}" -m mlx --cmake-dir OUTPUT_VARIABLE MLX_ROOT
                  OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()
find_package(MLX ${MFA_MLX_VERSION} EXACT CONFIG REQUIRED HINTS "${MLX_ROOT}" NO_DEFAULT_PATH)

# ---- libmfa.so ------------------------------------------------------------------------------------------------------
file(GLOB mlx_sources CONFIGURE_DEPENDS src/mlx/*.cpp)
file(GLOB public_headers CONFIGURE_DEPENDS include/mfa/*.h)
add_library(mfa SHARED ${mlx_sources})
add_library(mfa::mfa ALIAS mfa)
mfa_compile_options(mfa)
mfa_precompile(mfa <mlx/array.h> <mlx/ops.h>)
target_include_directories(mfa PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:include>)
target_compile_definitions(mfa PRIVATE MFA_VERSION="${PROJECT_VERSION}" MFA_MLX_VERSION="${MFA_MLX_VERSION}")
target_compile_features(mfa PUBLIC cxx_std_20)
# The whole archive: nothing else in the library refers to the exported functions of block_rules.h.
target_link_libraries(mfa PUBLIC mlx PRIVATE $<LINK_LIBRARY:WHOLE_ARCHIVE,mfa_core> ${CMAKE_DL_LIBS})
if(NOT APPLE AND NOT MFA_SANITIZE)
  target_link_options(mfa PRIVATE -Wl,-z,defs)  # a missing symbol is an error here, not when a user imports it
endif()
# Wheels hold no symbolic links, so the library carries no version in its name.
set_target_properties(mfa PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON
                                     INSTALL_RPATH "$ORIGIN/../../mlx/lib")

install(TARGETS mfa EXPORT mfaTargets LIBRARY DESTINATION lib COMPONENT library)
install(FILES ${public_headers} DESTINATION include/mfa COMPONENT library)

include(CMakePackageConfigHelpers)
configure_package_config_file(cmake/mfaConfig.cmake.in "${PROJECT_BINARY_DIR}/mfaConfig.cmake"
                              INSTALL_DESTINATION share/cmake/mfa)
write_basic_package_version_file("${PROJECT_BINARY_DIR}/mfaConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/mfaConfig.cmake" "${PROJECT_BINARY_DIR}/mfaConfigVersion.cmake"
        DESTINATION share/cmake/mfa COMPONENT library)
install(EXPORT mfaTargets NAMESPACE mfa:: DESTINATION share/cmake/mfa COMPONENT library)

# ---- _ext -----------------------------------------------------------------------------------------------------------
if(MFA_BUILD_PYTHON)
  file(GLOB binding_sources CONFIGURE_DEPENDS python/bindings/*.cpp)
  if(NOT nanobind_ROOT)
    execute_process(COMMAND "${Python_EXECUTABLE}" -m nanobind --cmake_dir OUTPUT_VARIABLE nanobind_ROOT
                    OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  endif()
  find_package(nanobind CONFIG REQUIRED)
  # MLX's Python types live in nanobind's domain "mlx"; the backend module makes one stable-ABI wheel share them.
  nanobind_add_module(_ext BACKEND_MODULE nanobind_backend NB_DOMAIN mlx NB_SUPPRESS_WARNINGS ${binding_sources})
  mfa_compile_options(_ext)
  mfa_precompile(_ext <nanobind/nanobind.h> <mlx/array.h>)
  target_compile_definitions(_ext PRIVATE MFA_VERSION="${PROJECT_VERSION}" MFA_MLX_VERSION="${MFA_MLX_VERSION}")
  target_link_libraries(_ext PRIVATE mfa)
  set_target_properties(_ext PROPERTIES INSTALL_RPATH "$ORIGIN/lib;$ORIGIN/../mlx/lib")
  install(TARGETS _ext LIBRARY DESTINATION . COMPONENT python)

  nanobind_add_stub(_ext_stub MODULE _ext OUTPUT "${PROJECT_BINARY_DIR}/_ext.pyi" PYTHON_PATH $<TARGET_FILE_DIR:_ext>
                    DEPENDS _ext)
  configure_file(python/bindings/_build_info.py.in _build_info.py @ONLY)
  install(FILES "${PROJECT_BINARY_DIR}/_ext.pyi" "${PROJECT_BINARY_DIR}/_build_info.py" DESTINATION . COMPONENT python)
endif()

# Outside a wheel MLX need not be a neighbour: remember where it was linked from.
if(NOT SKBUILD)
  foreach(target mfa _ext)
    if(TARGET ${target})
      set_target_properties(${target} PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON)
    endif()
  endforeach()
endif()

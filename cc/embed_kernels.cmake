# Embeds every file of cc/kernels, as string data, in a generated C++ file.
#
#   include(cc/embed_kernels.cmake)
#   jfa_embed_kernels(<target>)      # adds the generated file to the target
#
# The same file is the script that writes it: cmake -D JFA_CC_DIR=... -D JFA_OUTPUT=... -P <this>.

if(NOT CMAKE_SCRIPT_MODE_FILE)
  set(jfa_embed_script "${CMAKE_CURRENT_LIST_FILE}")

  function(jfa_embed_kernels target)
    get_filename_component(cc_dir "${jfa_embed_script}" DIRECTORY)
    set(output "${CMAKE_CURRENT_BINARY_DIR}/kernel_sources.cc")
    # A new kernel file makes CMake run again, a changed one only this command.
    file(GLOB kernels CONFIGURE_DEPENDS "${cc_dir}/kernels/*" "${cc_dir}/plan*")
    add_custom_command(
      OUTPUT "${output}"
      COMMAND "${CMAKE_COMMAND}" -D "JFA_CC_DIR=${cc_dir}" -D "JFA_OUTPUT=${output}" -P
              "${jfa_embed_script}"
      DEPENDS ${kernels} "${jfa_embed_script}"
      COMMENT "Embedding cc/kernels"
      VERBATIM)
    target_sources(${target} PRIVATE "${output}")
  endfunction()
  return()
endif()

file(GLOB kernels RELATIVE "${JFA_CC_DIR}/kernels" "${JFA_CC_DIR}/kernels/*")
list(FILTER kernels INCLUDE REGEX "^[A-Za-z0-9_]+[.](h|cuh)$")
list(SORT kernels)

set(text "// Generated from cc/kernels by embed_kernels.cmake.\n")
string(APPEND text "#include \"cc/kernel_sources.h\"\n\nnamespace jfa {\nnamespace {\n\n")
set(table "")
set(index 0)
foreach(name IN LISTS kernels)
  file(READ "${JFA_CC_DIR}/kernels/${name}" source)
  string(FIND "${source}" ")jfa_embed\"" clash)
  if(NOT clash EQUAL -1)
    message(FATAL_ERROR "${name} contains the delimiter of the string it is embedded as")
  endif()
  string(APPEND text "constexpr char kFile${index}[] = R\"jfa_embed(${source})jfa_embed\";\n\n")
  string(APPEND table "    {\"${name}\", kFile${index}, sizeof(kFile${index}) - 1},\n")
  math(EXPR index "${index} + 1")
endforeach()
string(APPEND text "}  // namespace\n\nconst EmbeddedFile kKernelSources[] = {\n${table}};\n")
string(APPEND text "const size_t kNumKernelSources = ${index};\n\n")

string(APPEND text "const HashedFile kPlanSources[] = {\n")
file(GLOB plans RELATIVE "${JFA_CC_DIR}" "${JFA_CC_DIR}/plan*")
list(FILTER plans INCLUDE REGEX "[.](h|cc)$")
list(SORT plans)
list(LENGTH plans num_plans)
foreach(name IN LISTS plans)
  file(SHA256 "${JFA_CC_DIR}/${name}" hash)
  string(APPEND text "    {\"${name}\", \"${hash}\"},\n")
endforeach()
string(APPEND text "};\nconst size_t kNumPlanSources = ${num_plans};\n\n}  // namespace jfa\n")
file(WRITE "${JFA_OUTPUT}" "${text}")

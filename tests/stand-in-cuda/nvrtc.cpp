// Compiles CUDA sources for the CPU, by the C++ compiler.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <regex>
#include <sstream>
#include <string>
#include <sys/stat.h>
#include <unistd.h>

#define API extern "C" __attribute__((visibility("default")))

struct Program {
    std::string source, library, log;
};

API int nvrtcGetNumSupportedArchs(int *count) { return *count = 3, 0; }
API int nvrtcGetSupportedArchs(int *known) {
    // Not the device's own: the newest before it is to be taken.
    known[0] = 70, known[1] = 75, known[2] = 90;
    return 0;
}
API int nvrtcCreateProgram(Program **program, const char *source, const char *, int, void *, void *) {
    *program = new Program{source, "", ""};
    return 0;
}
API int nvrtcDestroyProgram(Program **program) { return delete *program, 0; }

API int nvrtcCompileProgram(Program *program, int count, const char *const *options) {
    // Kept: it is the same for the same source and options. One thread at a time writes it.
    static std::mutex lock;
    std::lock_guard<std::mutex> guard(lock);
    std::string definitions;
    for (int i = 0; i < count; ++i) {
        if (!strncmp(options[i], "--gpu-architecture=", 19) && strcmp(options[i] + 19, "compute_75")) return 5;
        if (!strncmp(options[i], "-D", 2)) definitions += std::string(" ") + options[i];
    }
    std::string own(STAND_IN_DIR), source = "#include \"" + own + "/prelude.h\"\n" + program->source + "\n";
    std::regex kernel("__global__\\s+void\\s+(\\w+)\\s*\\(");
    auto end = std::sregex_iterator();
    for (auto it = std::sregex_iterator(program->source.begin(), program->source.end(), kernel); it != end; ++it) {
        source += "STAND_IN_KERNEL(" + (*it)[1].str() + ")\n";
    }
    std::ifstream prelude(own + "/prelude.h");
    std::stringstream text;
    text << prelude.rdbuf();
    const char *flags = getenv("STAND_IN_CXXFLAGS") ? getenv("STAND_IN_CXXFLAGS") : "-O1";
    size_t hash = std::hash<std::string>()(source + text.str() + definitions + flags);
    char name[64];
    snprintf(name, sizeof name, "kernels-%016zx", hash);
    std::string base = std::string(STAND_IN_BUILD) + "/" + name;
    program->library = base + ".so";
    if (!access(program->library.c_str(), R_OK)) return 0;
    std::string unique = base + "." + std::to_string(getpid());
    std::ofstream(unique + ".cpp") << source;
    std::string command = std::string("c++ -std=c++17 -g -fPIC -shared -ffp-contract=off "
                          "-fsanitize=alignment -fsanitize-undefined-trap-on-error ") + flags + definitions + " -o " +
                          unique + ".so " + unique + ".cpp 2> " + unique + ".log && mv " + unique + ".so " +
                          program->library;
    if (!system(command.c_str())) return 0;
    std::ifstream log(unique + ".log");
    std::stringstream lines;
    lines << log.rdbuf();
    program->log = lines.str();
    return 6;
}

API int nvrtcGetPTXSize(Program *program, size_t *size) {
    return *size = program->library.size() + 10, 0;
}
API int nvrtcGetPTX(Program *program, char *text) {
    return strcpy(text, ("stand-in:" + program->library).c_str()), 0;
}
API int nvrtcGetProgramLogSize(Program *program, size_t *size) {
    return *size = program->log.size() + 1, 0;
}
API int nvrtcGetProgramLog(Program *program, char *text) {
    return strcpy(text, program->log.c_str()), 0;
}

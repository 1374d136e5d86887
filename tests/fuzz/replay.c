/* replay.c: main() for a fuzz target where there is no libFuzzer: runs it on every file named. */
#include "fuzz.h"

int main(int argc, char ** argv) {
    for (int i = 1; i < argc; ++i) {
        FILE * file = fopen(argv[i], "rb");
        if (file == NULL || fseek(file, 0, SEEK_END) != 0) {
            perror(argv[i]);
            return 2;
        }
        const size_t size = (size_t) ftell(file);
        uint8_t * data = malloc(size + 1);
        rewind(file);
        if (data == NULL || fread(data, 1, size, file) != size) {
            perror(argv[i]);
            return 2;
        }
        fclose(file);
        printf("%s\n", argv[i]);
        fflush(stdout); /* the one that ends the process is the last named */
        LLVMFuzzerTestOneInput(data, size);
        free(data);
    }
    printf("%d inputs\n", argc - 1);
    return 0;
}

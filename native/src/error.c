/* error.c: the message of the calling thread's last failure. */
#include "error.h"

#include "tqgguf.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char message[512];

int tqi_fail(int status, const char * format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return status;
}

const char * tq_last_error(void) {
    return message;
}

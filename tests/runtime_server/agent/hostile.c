/* Programs that do not want to be killed: hop, bomb, fill, headless, usurp. */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/types.h>
#include <unistd.h>

static void *forever(void *unused) {
    for (;;)
        pause();
    return unused;
}

int main(int argc, char **argv) {
    const char *mode = argc > 1 ? argv[1] : "";
    for (int signal_number = 1; signal_number < 32; signal_number++)
        signal(signal_number, SIG_IGN);
    if (strcmp(mode, "hop") == 0) /* a new pid every few microseconds, its parent gone */
        for (;;)
            if (fork() > 0)
                _exit(0);
    if (strcmp(mode, "bomb") == 0)
        for (;;)
            if (fork() == 0)
                setsid();
    if (strcmp(mode, "fill") == 0) /* takes every process there is, and keeps them */
        for (;;)
            switch (fork()) {
            case 0:
                forever(NULL);
            case -1:
                usleep(1000);
            }
    if (strcmp(mode, "headless") == 0) { /* looks like a zombie: the first thread is gone, another lives */
        pthread_t thread;
        pthread_create(&thread, NULL, forever, NULL);
        pthread_exit(NULL);
    }
    if (strcmp(mode, "usurp") == 0) { /* kills its supervisor, then lives on under PID 1 */
        if (fork() == 0) {
            setsid();
            kill(getppid(), SIGKILL);
            for (;;)
                pause();
        }
        kill(getppid(), SIGKILL);
        for (;;)
            pause();
    }
    return 2;
}

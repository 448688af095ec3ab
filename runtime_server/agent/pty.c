/* Terminals: the master is ours and never blocks, the slave becomes a program's controlling terminal. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#ifndef TIOCGPTPEER
#define TIOCGPTPEER _IO('T', 0x41)
#endif

/* The slave is asked of the master, not opened by a path that code of the sandbox could have replaced. */
bool pty_open(int *master, int *slave, unsigned columns, unsigned rows) {
    int unlocked = 0;
    *master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    *slave = -1;
    if (*master < 0)
        return false;
    if (ioctl(*master, TIOCSPTLCK, &unlocked) == 0)
        *slave = ioctl(*master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (*slave < 0) {
        int error = errno;
        close(*master);
        *master = -1;
        errno = error;
        return false;
    }
    pty_resize(*master, columns, rows);
    return true;
}

void pty_resize(int master, unsigned columns, unsigned rows) {
    struct winsize size = {.ws_col = (unsigned short)columns, .ws_row = (unsigned short)rows};
    ioctl(master, TIOCSWINSZ, &size);
}

/* For a session: what is sent is not echoed, and output is not rewritten. */
void pty_plain(int slave) {
    struct termios mode;
    if (tcgetattr(slave, &mode) != 0)
        return;
    mode.c_lflag &= ~(tcflag_t)(ECHO | ECHOE | ECHOK | ECHONL | ECHOCTL | ECHOKE);
    mode.c_oflag &= ~(tcflag_t)OPOST;
    tcsetattr(slave, TCSANOW, &mode);
}

# busybox: the address of each name in a family, as "name 4 name 6 …".
while [ $# -gt 1 ]; do
    kind=A
    [ "$2" = 6 ] && kind=AAAA
    reply=$(busybox nslookup "-type=$kind" "$1" 2>&1)
    answer=$(printf '%s\n' "$reply" | sed -n '/^Name:/,$s/^Address: //p')
    status=$(printf '%s\n' "$reply" | sed -n "s/.*can't find.*: //p")
    echo "${answer:-${status:-no answer}}"
    shift 2
done

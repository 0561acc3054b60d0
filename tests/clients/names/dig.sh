# dig with the options in $DIG: the answer, or the status of a reply without one, for "name 4 name 6 …".
while [ $# -gt 1 ]; do
    kind=A
    [ "$2" = 6 ] && kind=AAAA
    reply=$(dig $DIG +tries=2 +timeout=2 "$1" "$kind")
    answer=$(printf '%s\n' "$reply" | awk '!/^;/ && NF { print $NF; exit }')
    status=$(printf '%s\n' "$reply" | sed -n 's/.*status: \([A-Z]*\).*/\1/p')
    case "$status$(printf '%s\n' "$reply" | grep -o 'ANSWER: 0')" in
    "NOERRORANSWER: 0") echo "NOERROR, no records" ;;
    NOERROR) echo "$answer" ;;
    *) echo "$status" ;;
    esac
    shift 2
done
